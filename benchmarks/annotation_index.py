"""The annotation index against pycocotools on a generated COCO file of real size: 118,000 images, 860,000 boxes with polygons.

Each side loads it in a process of its own, which reports its time and the growth of its resident memory.
    python benchmarks/annotation_index.py [--images 118000]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

SIDES = {
    "ours": "from steadydetr.data.layouts.coco import read_coco; from pathlib import Path\n"
    "load = lambda p: read_coco(Path(p), [Path('.')], 'x').index",
    "pycocotools": "from pycocotools.coco import COCO\nload = lambda p: COCO(p)",
}
PROGRAM = """
import gc, sys, time, contextlib, io
{load}
def resident():
    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmRSS')) / 1024
def peak():
    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')) / 1024
before = resident()
start = time.perf_counter()
with contextlib.redirect_stdout(io.StringIO()):
    data = load(sys.argv[1])
seconds = time.perf_counter() - start
gc.collect()
arrays = sum(getattr(value, 'nbytes', 0) for value in vars(data).values())
print(seconds, resident() - before, peak() - before, arrays / 2**20)
"""


def write(path: Path, images: int, boxes: int) -> None:
    rng = np.random.default_rng(0)
    owners, categories = rng.integers(images, size=boxes), rng.integers(1, 81, size=boxes)
    corners = rng.random((boxes, 2)) * 400
    sides = rng.random((boxes, 2)) * 200 + 1
    polygons = (rng.random((boxes, 30)) * 500).round(2)
    with open(path, "w") as file:
        file.write('{"categories": ' + json.dumps([{"id": i, "name": f"class {i}"} for i in range(1, 81)]) + ', "images": ')
        json.dump([{"id": i, "file_name": f"{i:012d}.jpg", "height": 480, "width": 640} for i in range(images)], file)
        file.write(', "annotations": [')
        for i in range(boxes):
            (x, y), (w, h) = corners[i].round(2).tolist(), sides[i].round(2).tolist()
            entry = {"id": i + 1, "image_id": int(owners[i]), "category_id": int(categories[i]), "bbox": [x, y, w, h], "area": w * h}
            entry |= {"iscrowd": 0, "segmentation": [polygons[i].tolist()]}
            file.write(("," if i else "") + json.dumps(entry))
        file.write("]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=118_000)
    images = parser.parse_args().images
    boxes = round(images * 860 / 118)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "instances.json"
        write(path, images, boxes)
        print(f"{images} images, {boxes} boxes, a file of {path.stat().st_size / 2**20:.0f} MiB")
        rows = {}
        for name, load in SIDES.items():
            done = subprocess.run([sys.executable, "-c", PROGRAM.format(load=load), str(path)], capture_output=True, text=True, check=True)
            rows[name] = [float(value) for value in done.stdout.split()]
            seconds, kept, peak, arrays = rows[name]
            print(f"{name:<12} {seconds:7.2f} s   kept {kept:7.0f} MiB (arrays {arrays:.0f})   peak {peak:7.0f} MiB")
    ours, peer = rows["ours"], rows["pycocotools"]
    print(
        f"ours is {peer[0] / ours[0]:.1f} times faster; pycocotools keeps {peer[1] / max(ours[3], 1e-9):.1f} times the size of our arrays,"
    )
    print(f"and {peer[1] / max(ours[1], 1):.1f} times our process's growth")


if __name__ == "__main__":
    main()
