"""The layouts of data that are known: each is one class, which recognises, reads and checks it."""

from steadydetr.data.layouts.base import ALL, ENCODING, DataLayout, Finding, NoMasks, NoSplit, Report, fault, stop
from steadydetr.data.layouts.coco import Coco, Roboflow
from steadydetr.data.layouts.coco_json import CocoJson
from steadydetr.data.layouts.cvat import Cvat
from steadydetr.data.layouts.hugging_face import HuggingFace
from steadydetr.data.layouts.image_folder import ImageFolder
from steadydetr.data.layouts.images_elsewhere import ImagesElsewhere
from steadydetr.data.layouts.label_studio import LabelStudio
from steadydetr.data.layouts.labelme import Labelme
from steadydetr.data.layouts.lvis import Lvis
from steadydetr.data.layouts.open_images import OpenImages
from steadydetr.data.layouts.recognition import joined_places, layout_of
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
    "HuggingFace",
    "ImageFolder",
    "ImagesElsewhere",
    "LabelStudio",
    "Labelme",
    "Lvis",
    "NoMasks",
    "NoSplit",
    "OpenImages",
    "Report",
    "Roboflow",
    "Shapes",
    "Voc",
    "VocFolders",
    "VocYears",
    "Yolo",
    "fault",
    "joined_places",
    "layout_of",
    "stop",
]
