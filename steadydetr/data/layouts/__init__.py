"""The layouts of data that are known: each is one class, which recognises, reads and checks it."""

from steadydetr.data.layouts.base import ALL, ENCODING, DataLayout, Finding, NoSplit, Report, fault
from steadydetr.data.layouts.coco import Coco, Roboflow
from steadydetr.data.layouts.coco_json import CocoJson
from steadydetr.data.layouts.cvat import Cvat
from steadydetr.data.layouts.shapes import Shapes
from steadydetr.data.layouts.voc import Voc, VocFolders, VocYears
from steadydetr.data.layouts.yolo import Yolo

__all__ = [
    "ALL",
    "ENCODING",
    "Coco",
    "CocoJson",
    "Cvat",
    "DataLayout",
    "Finding",
    "NoSplit",
    "Report",
    "Roboflow",
    "Shapes",
    "Voc",
    "VocFolders",
    "VocYears",
    "Yolo",
    "fault",
]
