"""Images and boxes loaded by one core, against torchvision's CocoDetection with v2 transforms, and against transformers' image processors.

python benchmarks/loading.py [--data ../shared/data/coco128] [--rounds 3] [--batch 4]

All read the same files in the same order, make the same sizes and pad batches. Ours end as bytes (uint8), which a GPU normalises; the
second line of each comparison adds that on this core, so that both sides end with the same numbers. The sides take turns, and times are
those of the process (CPU) and of the clock (wall). The ratio is how many times as many images ours loads in a CPU second, round by round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core, also for what asks before torch is told

import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from steadydetr.data import DetrTransform, FixedSize, FixedSizeTransform, ShortestSide, open_data
from steadydetr.data.dataset import FolderDataset
from steadydetr.data.loading import Samples
from steadydetr.data.transforms import Transform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Work = Callable[[], object]


@dataclass(frozen=True)
class Files:
    """The data that all sides read."""

    data: FolderDataset
    annotations: Path
    batch: int

    @property
    def positions(self) -> list[int]:
        """Of the images with objects: torchvision's steps for boxes fail where there are none."""
        return [position for position, count in enumerate(self.data.index.counts.tolist()) if count]

    @property
    def batches(self) -> Iterator[list[int]]:
        return (self.positions[start : start + self.batch] for start in range(0, len(self.positions), self.batch))


def ours(files: Files, transform: Transform, reduce: bool = False, normalise: bool = False) -> None:
    samples, (mean, std) = Samples(files.data, transform, reduce), (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    for positions in files.batches:
        batch = samples.batch([(position, position) for position in positions])
        if normalise:
            batch.images.float().div_(255).sub_(mean).div_(std).masked_fill_(batch.padding[:, None], 0)


def by_torchvision(files: Files, steps: list[v2.Transform]) -> None:
    steps = [v2.ToImage(), *steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    with redirect_stdout(StringIO()):  # pycocotools says that it reads
        images = CocoDetection(files.data.folder, files.annotations, transforms=v2.Compose(steps))
    numbers = [images.ids.index(int(files.data.index.image_ids[position])) for position in files.positions]
    wrapped = Subset(wrap_dataset_for_transforms_v2(images, target_keys=["boxes", "labels"]), numbers)
    for _ in DataLoader(wrapped, files.batch, collate_fn=padded):
        pass


def padded(samples: list[tuple[Tensor, dict[str, Any]]]) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
    """As torchvision's references for detection: images and masks in one tensor each."""
    height, width = (max(image.shape[side] for image, _ in samples) for side in (1, 2))
    images = [pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image, _ in samples]
    masks = [
        pad(torch.zeros(image.shape[1:], dtype=torch.bool), (0, width - image.shape[2], 0, height - image.shape[1]), value=True)
        for image, _ in samples
    ]
    return torch.stack(images), torch.stack(masks), [target for _, target in samples]


def by_transformers(files: Files, kind: str, size: dict[str, int]) -> None:
    processor = getattr(transformers, kind)(size=size)
    index = files.data.index
    for positions in files.batches:
        pictures, targets = [], []
        for position in positions:
            pictures.append(Image.open(files.data.folder / index.file(position)).convert("RGB"))
            boxes, labels = index.boxes_xyxy[index.rows(position)].copy(), index.labels[index.rows(position)]
            boxes[:, 2:] -= boxes[:, :2]
            objects = [
                {"bbox": box, "category_id": label, "area": box[2] * box[3], "iscrowd": 0, "image_id": position}
                for box, label in zip(boxes.tolist(), labels.tolist(), strict=True)
            ]
            targets.append({"image_id": position, "annotations": objects})
        processor(pictures, targets, return_tensors="pt")


def compare(what: str, mine: dict[str, Work], peers: dict[str, Work], rounds: int, images: int) -> None:
    """Print a table: every side, in turn, in every round."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in (*mine, *peers)}
    for turn in range(rounds + 1):
        for name, work in {**mine, **peers}.items():
            cpu, wall = time.process_time(), time.perf_counter()
            work()
            if turn:  # the first warms up
                times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    print(f"\n{what}")
    for name, found in times.items():
        cpus, walls = zip(*found, strict=True)
        speeds = f"{images / statistics.median(cpus):7.1f} images a CPU second, {images / statistics.median(walls):7.1f} a second"
        rounds_of = {peer: zip(times[peer], found, strict=True) for peer in peers if name in mine}
        ratios = [f"{statistics.median(theirs[0] / our[0] for theirs, our in pairs):5.2f} x {peer}" for peer, pairs in rounds_of.items()]
        print(f"  {name:<32}{speeds}  {'  '.join(ratios)}", flush=True)


def sides(
    files: Files, transform: Transform, steps: list[v2.Transform], size: dict[str, int] | None, fast: bool
) -> tuple[dict[str, Work], dict[str, Work]]:
    """Ours, and the peers that do the same."""
    mine: dict[str, Work] = {
        "ours, bytes": partial(ours, files, transform),
        "ours, normalised": partial(ours, files, transform, normalise=True),
    }
    if fast:
        mine["ours, bytes, decode fast"] = partial(ours, files, transform, reduce=True)
        mine["ours, normalised, decode fast"] = partial(ours, files, transform, reduce=True, normalise=True)
    peers: dict[str, Work] = {"torchvision": partial(by_torchvision, files, steps)}
    kinds: Iterable[str] = ("DeformableDetrImageProcessor", "DeformableDetrImageProcessorPil") if size else ()
    peers |= {
        f"transformers{kind[28:]}": partial(by_transformers, files, kind, size or {}) for kind in kinds if hasattr(transformers, kind)
    }
    return mine, peers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/coco128")
    parser.add_argument("--split", default="val")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = open_data(options.data, options.split)
    assert isinstance(data, FolderDataset)
    (annotations,) = Path(options.data).glob(f"annotations/instances_{options.split}*.json")
    files = Files(data, annotations, options.batch)
    images = len(files.positions)
    print(f"{images} images, batches of {options.batch}, torch {torch.__version__}, transformers {transformers.__version__}")

    boxes = [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1)]
    short, long = 800, 1333
    resize = sides(
        files, ShortestSide(short, long), [v2.Resize(short, max_size=long)], {"shortest_edge": short, "longest_edge": long}, False
    )
    compare(f"resize to {short} / {long}", *resize, options.rounds, images)
    augmentation = DetrTransform()
    resized = v2.RandomShortestSize(list(augmentation.shortest), augmentation.longest)
    cropped = v2.Compose([v2.RandomShortestSize([400, 500, 600]), v2.RandomCrop((384, 384), pad_if_needed=True), resized])
    steps = [v2.RandomHorizontalFlip(), v2.RandomChoice([resized, cropped]), *boxes]
    compare("augmentation of DETR, 480 .. 800 / 1333", *sides(files, augmentation, steps, None, False), options.rounds, images)
    small = {"height": 128, "width": 128}
    compare(
        "resize to 128 x 128, to evaluate",
        *sides(files, FixedSize(128, 128), [v2.Resize((128, 128))], small, False),
        options.rounds,
        images,
    )
    flipped = [v2.RandomHorizontalFlip(), v2.Resize((128, 128)), *boxes]
    compare(
        "flip and resize to 128 x 128, to train", *sides(files, FixedSizeTransform(128, 128), flipped, small, True), options.rounds, images
    )


if __name__ == "__main__":
    main()
