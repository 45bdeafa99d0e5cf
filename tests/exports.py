"""One small data set, written as tools export it: COCO in its places, Pascal VOC, YOLO, CVAT."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from tests.data_folders import picture

CLASSES = ("bolt", "nut m4", "washer", "Öse")  # no box is a washer
Box = tuple[str, float, float, float, float]  # class, x0, y0, x1, y1 in pixels


@dataclass(frozen=True)
class Photo:
    name: str
    size: tuple[int, int]  # width, height
    boxes: tuple[Box, ...]
    split: str = "train"


PHOTOS = (
    Photo("a 1.png", (64, 48), (("nut m4", 1, 2, 30, 40), ("bolt", 10.125, 0, 63.875, 47.5), ("nut m4", 5, 5, 6.5, 9))),
    Photo("Straße/ñ 2.png", (33, 101), (("Öse", 0, 0, 33, 101), ("bolt", 3.25, 70.625, 20, 100.875))),
    Photo("Straße/b.png", (120, 80), ()),
    Photo("c.d.png", (7, 9), (("bolt", 1, 1, 6, 8.5), ("bolt", 0.3, 1.1, 6.7, 8.9))),
    Photo("Straße/e.png", (101, 33), (("Öse", 50.5, 1.75, 99, 31), ("nut m4", 2.07, 3.3, 40.61, 5.19)), "val"),
    Photo("f_2.png", (48, 64), (), "val"),
)


def whole(photos: tuple[Photo, ...] = PHOTOS) -> tuple[Photo, ...]:
    """The same with boxes of whole pixels, for formats that cannot hold others."""
    return tuple(Photo(p.name, p.size, tuple((b[0], *(float(int(v)) for v in b[1:])) for b in p.boxes), p.split) for p in photos)  # type: ignore[misc]


def flat(photos: tuple[Photo, ...] = PHOTOS) -> tuple[Photo, ...]:
    """The same without folders, for tools that know none."""
    return tuple(Photo(p.name.rpartition("/")[2], p.size, p.boxes, p.split) for p in photos)


def of(split: str, photos: tuple[Photo, ...]) -> tuple[Photo, ...]:
    return tuple(photo for photo in photos if split in (photo.split, "all"))


def write(path: Path, content: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(encoding))
    return path


# COCO


def coco(photos: tuple[Photo, ...], prefix: str = "", first: int = 1) -> dict[str, Any]:
    images = [
        {"id": first + i, "width": p.size[0], "height": p.size[1], "file_name": prefix + p.name, "license": 0} for i, p in enumerate(photos)
    ]
    boxes = [(first + i, box) for i, p in enumerate(photos) for box in p.boxes]
    annotations = [
        {
            "id": number,
            "image_id": image,
            "category_id": CLASSES.index(name) + first,
            "segmentation": [],
            "area": (x1 - x0) * (y1 - y0),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "iscrowd": 0,
        }
        for number, (image, (name, x0, y0, x1, y1)) in enumerate(boxes, 1)
    ]
    categories = [{"id": i + first, "name": name, "supercategory": ""} for i, name in enumerate(CLASSES)]
    return {"info": {}, "licenses": [], "categories": categories, "images": images, "annotations": annotations}


def write_coco(path: Path, folder: Path, photos: tuple[Photo, ...], prefix: str = "", first: int = 1) -> None:
    write(path, json.dumps(coco(photos, prefix, first)))
    for photo in photos:
        picture(folder / photo.name, photo.size)


def coco_own(root: Path, photos: tuple[Photo, ...]) -> None:
    for split in ("train", "val"):
        write_coco(root / "annotations" / f"instances_{split}2017.json", root / f"{split}2017", of(split, photos))


def coco_cvat(root: Path, photos: tuple[Photo, ...]) -> None:
    """A CVAT task, exported as COCO 1.0."""
    write_coco(root / "annotations" / "instances_default.json", root / "images" / "default", photos)


def coco_cvat_project(root: Path, photos: tuple[Photo, ...]) -> None:
    for split, name in (("train", "Train"), ("val", "Validation")):
        write_coco(root / "annotations" / f"instances_{name}.json", root / "images" / name, of(split, photos))


def coco_label_studio(root: Path, photos: tuple[Photo, ...]) -> None:
    write_coco(root / "result.json", root / "images", photos, "images/", first=0)


def coco_fiftyone(root: Path, photos: tuple[Photo, ...]) -> None:
    write_coco(root / "labels.json", root / "data", photos)


def coco_beside(root: Path, photos: tuple[Photo, ...]) -> None:
    write_coco(root / "_annotations.coco.json", root, photos)


def coco_split_files(root: Path, photos: tuple[Photo, ...]) -> None:
    for split, name in (("train", "train"), ("val", "my_val_set")):
        write_coco(root / f"{name}.json", root / "images", of(split, photos))


def coco_annotations(root: Path, photos: tuple[Photo, ...]) -> None:
    for split in ("train", "val"):
        write_coco(root / "annotations" / f"{split}.json", root / split, of(split, photos))


def coco_split_folders(root: Path, photos: tuple[Photo, ...]) -> None:
    for split, name in (("train", "train"), ("val", "validation")):
        write_coco(root / name / "labels.json", root / name / "data", of(split, photos))


# VOC


UNKNOWN = "<source><database>Unknown</database></source>"


def xml(photo: Photo, source: str = UNKNOWN, first: int = 1) -> str:
    """Coordinates count pixels from `first`, 1 in VOC, and include the last one."""
    objects = "".join(
        f"<object><name>{escape(name)}</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>"
        f"<bndbox><xmin>{x0 + first}</xmin><ymin>{y0 + first}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for name, x0, y0, x1, y1 in photo.boxes
    )
    return (
        f"<annotation>\n\t<folder>x</folder><filename>{escape(photo.name.rpartition('/')[2])}</filename><path>/home/me/x.png</path>"
        f"{source}<size><width>{photo.size[0]}</width><height>{photo.size[1]}</height>"
        f"<depth>3</depth></size><segmented>0</segmented>{objects}</annotation>"
    )


def write_voc(annotations: Path, images: Path, photos: tuple[Photo, ...], source: str = UNKNOWN, first: int = 1) -> None:
    for photo in photos:
        write((annotations / photo.name).with_suffix(".xml"), xml(photo, source, first))
        picture(images / photo.name, photo.size)


def voc_own(root: Path, photos: tuple[Photo, ...]) -> None:
    write_voc(root / "Annotations", root / "JPEGImages", photos)
    for split in ("train", "val"):
        write(root / "ImageSets/Main" / f"{split}.txt", "".join(f"{p.name.removesuffix('.png')}\n" for p in of(split, photos)))


def voc_cvat(root: Path, photos: tuple[Photo, ...]) -> None:
    """A CVAT task, exported as Pascal VOC 1.1: coordinates as they are."""
    source = "<source><database>Unknown</database><annotation>Unknown</annotation><image>Unknown</image></source>"
    write_voc(root / "Annotations", root / "JPEGImages", photos, source, first=0)
    write(root / "ImageSets/Main/default.txt", "".join(f"{p.name.removesuffix('.png')}\n" for p in photos))
    write(root / "labelmap.txt", "# label:color_rgb:parts:actions\nbackground:0,0,0::\n" + "".join(f"{name}:1,2,3::\n" for name in CLASSES))


def voc_without_lists(root: Path, photos: tuple[Photo, ...]) -> None:
    write_voc(root / "Annotations", root / "JPEGImages", photos)


def voc_label_studio(root: Path, photos: tuple[Photo, ...]) -> None:
    source = "<source><database>MyDatabase</database></source><owner><flickrid>NULL</flickrid><name>Label Studio</name></owner>"
    write_voc(root / "Annotations", root / "images", photos, source, first=0)


def voc_labelimg(root: Path, photos: tuple[Photo, ...]) -> None:
    write_voc(root, root, photos)


def voc_roboflow(root: Path, photos: tuple[Photo, ...]) -> None:
    for split, name in (("train", "train"), ("val", "valid")):
        write_voc(root / name, root / name, of(split, photos))


def voc_split_below(root: Path, photos: tuple[Photo, ...]) -> None:
    for split in ("train", "val"):
        write_voc(root / "annotations" / split, root / "images" / split, of(split, photos))


# YOLO


def lines(photo: Photo, more: str = "") -> str:
    (width, height), found = photo.size, []
    for name, x0, y0, x1, y1 in photo.boxes:
        box = ((x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height)
        found.append(f"{CLASSES.index(name)} {' '.join(map(repr, box))}{more}\n")
    return "".join(found)


def corners(photo: Photo) -> str:
    """Oriented boxes: class x1 y1 x2 y2 x3 y3 x4 y4."""
    (width, height), found = photo.size, []
    for name, x0, y0, x1, y1 in photo.boxes:
        points = ((x0, y0), (x1, y0), (x1, y1), (x0, y1))
        found.append(f"{CLASSES.index(name)} {' '.join(f'{x / width!r} {y / height!r}' for x, y in points)}\n")
    return "".join(found)


def polygons(photo: Photo) -> str:
    (width, height), found = photo.size, []
    for name, x0, y0, x1, y1 in photo.boxes:
        points = ((x0, y0), ((x0 + x1) / 2, y0), (x1, y1), (x0, (y0 + y1) / 2), (x0, y1))
        found.append(f"{CLASSES.index(name)} {' '.join(f'{x / width!r} {y / height!r}' for x, y in points)}\n")
    return "".join(found)


def write_yolo(images: Path, labels: Path, photos: tuple[Photo, ...], text: Callable[[Photo], str] = lines) -> None:
    """An image without objects has an empty label file, or none if its name has a digit."""
    for photo in photos:
        picture(images / photo.name, photo.size)
        if photo.boxes or not any(map(str.isdigit, photo.name)):
            write((labels / photo.name).with_suffix(".txt"), text(photo))


NAMES = "names:\n" + "".join(f"  {i}: {name}\n" for i, name in enumerate(CLASSES))
NAMES_LIST = f"nc: {len(CLASSES)}\nnames: {list(CLASSES)}\n"


def yolo_ultralytics(root: Path, photos: tuple[Photo, ...], text: Callable[[Photo], str] = lines) -> None:
    for split in ("train", "val"):
        write_yolo(root / "images" / split, root / "labels" / split, of(split, photos), text)
    write(
        root / "data.yaml",
        f"# a comment\npath: ../datasets/mine  # dataset root dir\ntrain: images/train\nval: images/val\ntest:\n\n{NAMES}",
    )


def yolo_obb(root: Path, photos: tuple[Photo, ...]) -> None:
    yolo_ultralytics(root, photos, corners)


def yolo_polygons(root: Path, photos: tuple[Photo, ...]) -> None:
    yolo_ultralytics(root, photos, polygons)


def yolo_with_confidence(root: Path, photos: tuple[Photo, ...]) -> None:
    yolo_ultralytics(root, photos, lambda photo: lines(photo, " 0.75"))


def yolo_roboflow(root: Path, photos: tuple[Photo, ...]) -> None:
    for split, name in (("train", "train"), ("val", "valid")):
        write_yolo(root / name / "images", root / name / "labels", of(split, photos))
    head = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\n"
    write(root / "data.yaml", f"{head}{NAMES_LIST}\nroboflow:\n  workspace: me\n  version: 1\n  license: CC BY 4.0\n")


def yolo_lists(root: Path, photos: tuple[Photo, ...]) -> None:
    """As CVAT exports Ultralytics YOLO: lists of images, whose paths begin with `data/`."""
    for split in ("train", "val"):
        write_yolo(root / "images" / split, root / "labels" / split, of(split, photos))
        write(root / f"{split}.txt", "".join(f"data/images/{split}/{photo.name}\n" for photo in of(split, photos)))
    write(root / "data.yaml", f"path: ./\ntrain: train.txt\nval: val.txt\n{NAMES}")


def yolo_of_folders(root: Path, photos: tuple[Photo, ...]) -> None:
    """A split of several folders, and absolute paths of another machine."""
    parts = {name: tuple(p for p in photos if p.split == "train" and ("/" in p.name) == (name == "a")) for name in ("a", "b")}
    for name, part in parts.items():
        write_yolo(root / "images" / name, root / "labels" / name, part)
    write_yolo(root / "images" / "v", root / "labels" / "v", of("val", photos))
    write(root / "set.yml", f"train:\n  - ./images/b\n  - images/a\nval: /content/drive/mine/images/v\n{NAMES_LIST}")


def yolo_supervision(root: Path, photos: tuple[Photo, ...]) -> None:
    """As the package supervision writes it: a data.yaml that says nothing of splits."""
    for split in ("train", "val"):
        write_yolo(root / split / "images", root / split / "labels", of(split, photos))
    write(root / "data.yaml", NAMES_LIST)


def yolo_below(root: Path, photos: tuple[Photo, ...]) -> None:
    """An archive that was unpacked into a folder of its own."""
    yolo_ultralytics(root / "my set-1", photos)


def yolo_darknet(root: Path, photos: tuple[Photo, ...]) -> None:
    """CVAT's YOLO 1.1: labels beside the images."""
    for split, name in (("train", "train"), ("val", "valid")):
        write_yolo(root / f"obj_{name}_data", root / f"obj_{name}_data", of(split, photos))
        write(root / f"{name}.txt", "".join(f"data/obj_{name}_data/{photo.name}\n" for photo in of(split, photos)))
    data = "classes = 4\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\nbackup = backup/\n"
    write(root / "obj.data", data)
    write(root / "obj.names", "\n".join(CLASSES))


def yolo_roboflow_darknet(root: Path, photos: tuple[Photo, ...]) -> None:
    for split, name in (("train", "train"), ("val", "valid")):
        write_yolo(root / name, root / name, of(split, photos))
        write(root / name / "_darknet.labels", "\n".join(CLASSES))


def yolo_label_studio(root: Path, photos: tuple[Photo, ...]) -> None:
    write_yolo(root / "images", root / "labels", photos)
    write(root / "classes.txt", "".join(f"{name}\n" for name in CLASSES))
    write(root / "notes.json", json.dumps({"categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES)], "info": {}}))


def yolo_labelimg(root: Path, photos: tuple[Photo, ...]) -> None:
    write_yolo(root, root, photos)
    write(root / "classes.txt", "".join(f"{name}\r\n" for name in CLASSES))


# CVAT for images 1.1


def cvat_xml(photos: tuple[Photo, ...], subsets: bool, shapes: Callable[[Photo], str]) -> str:
    labels = "".join(f"<label><name>{escape(name)}</name><color>#c06060</color><type>any</type></label>" for name in CLASSES)
    kind = "project" if subsets else "task"
    images = []
    for number, photo in enumerate(photos):
        subset = f' subset="{ {"train": "Train", "val": "Validation"}[photo.split] }" task_id="1"' if subsets else ""
        head = f'<image id="{number}" name={quoteattr(photo.name)}{subset} width="{photo.size[0]}" height="{photo.size[1]}">'
        images.append(f"{head}\n{shapes(photo)}</image>")
    meta = f"<meta><{kind}><id>4</id><name>x</name><mode>annotation</mode><labels>{labels}</labels></{kind}><dumped>now</dumped></meta>"
    return f'<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version>{meta}\n' + "\n".join(images) + "</annotations>\n"


def cvat_boxes(photo: Photo) -> str:
    return "".join(
        f'<box label={quoteattr(name)} source="manual" occluded="0" xtl="{x0}" ytl="{y0}" xbr="{x1}" ybr="{y1}" z_order="0"></box>\n'
        for name, x0, y0, x1, y1 in photo.boxes
    )


def cvat_polygons(photo: Photo) -> str:
    return "".join(
        f'<polygon label={quoteattr(name)} source="manual" occluded="0" points="{x0},{y0};{x1},{y0};{x1},{y1}" z_order="0"></polygon>\n'
        for name, x0, y0, x1, y1 in photo.boxes
    )


def cvat_masks(photo: Photo) -> str:
    return "".join(
        f'<mask label={quoteattr(name)} source="semi-auto" occluded="0" rle="0, {int((x1 - x0) * (y1 - y0))}"'
        f' left="{int(x0)}" top="{int(y0)}" width="{int(x1 - x0)}" height="{int(y1 - y0)}" z_order="0"></mask>\n'
        for name, x0, y0, x1, y1 in photo.boxes
    )


def cvat_task(root: Path, photos: tuple[Photo, ...], shapes: Callable[[Photo], str] = cvat_boxes) -> None:
    write(root / "annotations.xml", cvat_xml(photos, False, shapes))
    for photo in photos:
        picture(root / "images" / photo.name, photo.size)


def cvat_task_polygons(root: Path, photos: tuple[Photo, ...]) -> None:
    cvat_task(root, photos, cvat_polygons)


def cvat_task_masks(root: Path, photos: tuple[Photo, ...]) -> None:
    cvat_task(root, photos, cvat_masks)


def cvat_project(root: Path, photos: tuple[Photo, ...]) -> None:
    write(root / "annotations.xml", cvat_xml(photos, True, cvat_boxes))
    for photo in photos:
        picture(root / "images" / {"train": "Train", "val": "Validation"}[photo.split] / photo.name, photo.size)


Writer = Callable[[Path, tuple[Photo, ...]], None]
# by name: the layout that reads it, the splits that it has, the writer, and what it cannot hold
EXPORTS: dict[str, tuple[str, tuple[str, ...], Writer, str]] = {
    "COCO": ("Coco", ("train", "val"), coco_own, ""),
    "COCO of CVAT": ("Coco", ("all",), coco_cvat, ""),
    "COCO of a CVAT project": ("Coco", ("train", "val"), coco_cvat_project, ""),
    "COCO of Label Studio": ("CocoJson", ("all",), coco_label_studio, ""),
    "COCO of FiftyOne": ("CocoJson", ("all",), coco_fiftyone, ""),
    "COCO beside its images": ("CocoJson", ("all",), coco_beside, ""),
    "COCO, a file for each split": ("CocoJson", ("train", "val"), coco_split_files, ""),
    "COCO in annotations": ("CocoJson", ("train", "val"), coco_annotations, ""),
    "COCO in folders of splits": ("CocoJson", ("train", "val"), coco_split_folders, ""),
    "VOC": ("Voc", ("train", "val"), voc_own, ""),
    "VOC of CVAT": ("Voc", ("all",), voc_cvat, ""),
    "VOC without lists": ("VocFolders", ("all",), voc_without_lists, ""),
    "VOC of Label Studio": ("VocFolders", ("all",), voc_label_studio, ""),
    "VOC of labelImg": ("VocFolders", ("all",), voc_labelimg, ""),
    "VOC of Roboflow": ("VocFolders", ("train", "val"), voc_roboflow, "folders"),
    "VOC in annotations": ("VocFolders", ("train", "val"), voc_split_below, ""),
    "YOLO": ("Yolo", ("train", "val"), yolo_ultralytics, ""),
    "YOLO with oriented boxes": ("Yolo", ("train", "val"), yolo_obb, ""),
    "YOLO with polygons": ("Yolo", ("train", "val"), yolo_polygons, ""),
    "YOLO with confidences": ("Yolo", ("train", "val"), yolo_with_confidence, ""),
    "YOLO of Roboflow": ("Yolo", ("train", "val"), yolo_roboflow, "folders"),
    "YOLO with lists": ("Yolo", ("train", "val"), yolo_lists, ""),
    "YOLO of supervision": ("Yolo", ("train", "val"), yolo_supervision, ""),
    "YOLO of several folders": ("Yolo", ("train", "val"), yolo_of_folders, ""),
    "YOLO in a folder below": ("Yolo", ("train", "val"), yolo_below, ""),
    "darknet": ("Yolo", ("train", "val"), yolo_darknet, ""),
    "darknet of Roboflow": ("Yolo", ("train", "val"), yolo_roboflow_darknet, "folders"),
    "YOLO of Label Studio": ("Yolo", ("all",), yolo_label_studio, ""),
    "YOLO of labelImg": ("Yolo", ("all",), yolo_labelimg, ""),
    "CVAT": ("Cvat", ("all",), cvat_task, ""),
    "CVAT with polygons": ("Cvat", ("all",), cvat_task_polygons, ""),
    "CVAT with masks": ("Cvat", ("all",), cvat_task_masks, "fractions"),
    "a CVAT project": ("Cvat", ("train", "val"), cvat_project, ""),
}


def export(name: str, root: Path) -> tuple[Photo, ...]:
    """Write the data set as the named export; gives what it holds."""
    _, _, writer, lost = EXPORTS[name]
    photos = flat() if lost == "folders" else whole() if lost == "fractions" else PHOTOS
    writer(root, photos)
    return photos
