"""The annotation index against pycocotools on a generated COCO file of real size: 118,000 images, 860,000 boxes with polygons.

Each side loads it in a process of its own, which reports its time and the growth of its resident memory.
    python benchmarks/annotation_index.py [--images 118000]
    python benchmarks/annotation_index.py --images 1700000 --boxes 15000000 --no-polygons --no-peer    # the size of Objects365
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

BLOCK = 10_000  # entries that are written at once
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
before, peak_before = resident(), peak()
start, start_of_core = time.perf_counter(), time.process_time()
with contextlib.redirect_stdout(io.StringIO()):
    data = load(sys.argv[1])
seconds, of_core = time.perf_counter() - start, time.process_time() - start_of_core
highest = peak() - peak_before
gc.collect()
arrays = sum(getattr(value, 'nbytes', 0) for value in vars(data).values())
print(seconds, resident() - before, highest, arrays / 2**20, of_core)
"""


def write(path: Path, images: int, boxes: int, polygons: bool) -> None:
    """A COCO file in random order of the images. Entries are formatted many at a time, by one template."""
    rng = np.random.default_rng(0)
    image = '{"id": %d, "file_name": "images/v1/patch%d/objects365_v1_%08d.jpg", "height": 480, "width": 640}'
    box = '{"id": %d, "image_id": %d, "category_id": %d, "bbox": [%.2f, %.2f, %.2f, %.2f], "area": %.4f, "iscrowd": 0'
    box += f', "segmentation": [[{", ".join(["%.2f"] * 30)}]]' * polygons + "}"
    with open(path, "w") as file:
        file.write('{"categories": ' + json.dumps([{"id": i, "name": f"class {i}"} for i in range(1, 81)]))
        for name, total, template in (("images", images, image), ("annotations", boxes, box)):
            file.write(f', "{name}": [')
            for start in range(0, total, BLOCK):
                ids = np.arange(start, min(start + BLOCK, total))
                if name == "images":
                    columns = [ids, ids % 51, ids]
                else:
                    x, y, w, h = (rng.random((4, len(ids))) * [[400], [400], [200], [200]] + 1).round(2)
                    columns = [ids + 1, rng.integers(images, size=len(ids)), rng.integers(1, 81, size=len(ids)), x, y, w, h, w * h]
                    columns += list(rng.random((30, len(ids))) * 500) if polygons else []
                values = tuple(value for row in zip(*(column.tolist() for column in columns), strict=True) for value in row)
                file.write(("," if start else "") + ",".join([template] * len(ids)) % values)
            file.write("]")
        file.write("}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--boxes", type=int, help="as many for each image as COCO has, if not given")
    parser.add_argument("--polygons", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="load it by pycocotools too")
    args = parser.parse_args()
    boxes = args.boxes or round(args.images * 860 / 118)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "instances.json"
        write(path, args.images, boxes, args.polygons)
        print(f"{args.images} images, {boxes} boxes, a file of {path.stat().st_size / 2**20:.0f} MiB", flush=True)
        rows = {}
        for name in SIDES if args.peer else ("ours",):
            done = subprocess.run([sys.executable, "-c", PROGRAM.format(load=SIDES[name]), str(path)], stdout=subprocess.PIPE, check=True)
            rows[name] = [float(value) for value in done.stdout.split()]
            seconds, kept, peak, arrays, of_core = rows[name]
            print(
                f"{name:<12} {seconds:7.2f} s, {of_core:.2f} of a core   kept {kept:7.0f} MiB (arrays {arrays:.0f})   peak {peak:7.0f} MiB"
            )
    if args.peer:
        ours, peer = rows["ours"], rows["pycocotools"]
        print(f"ours is {peer[0] / ours[0]:.1f} times faster; pycocotools keeps {peer[1] / max(ours[3], 1e-9):.1f} times our arrays,")
        print(f"and {peer[1] / max(ours[1], 1):.1f} times our process's growth")


if __name__ == "__main__":
    main()
