"""`shapes`: an embedded data set, generated on the fly, deterministic for (seed, split, index), with nothing to download.

Six classes of outline, 1 to 12 objects an image, overlaps, textured backgrounds. Colour and texture are drawn independently of
the class. At least 30% of the objects are small in COCO's sense (box area below 32 x 32 pixels), at every image size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from steadydetr.data.index import AnnotationIndex
from steadydetr.data.masks import Masks
from steadydetr.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

CLASSES = ("disc", "square", "triangle", "cross", "ring", "star")
SMALL_SHARE = 0.4  # share of objects that are drawn small; above the promised 30%, because crowded images drop large ones first
VISIBLE_SHARE = 0.7  # of an object that later ones must leave uncovered
SPLITS = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class ShapesConfig:
    """The options of `shapes:size=128,images=2000,seed=0`."""

    size: int = 128  # pixels, square
    images: int | None = None  # None: 3200 to train, 400 to validate
    seed: int = 0
    most: int = 12  # objects of an image
    classes: int = len(CLASSES)  # the first so many outlines

    def __post_init__(self) -> None:
        if self.size < 64:
            raise ValueError(f"shapes:size={self.size} is too small to tell outlines apart; at least 64")
        if not 1 <= self.most <= 12:
            raise ValueError(f"shapes:most={self.most} must lie in 1..12")
        if not 1 <= self.classes <= len(CLASSES):
            raise ValueError(f"shapes:classes={self.classes} must lie in 1..{len(CLASSES)}")
        if self.images is not None and self.images < 1:
            raise ValueError(f"shapes:images={self.images} must be positive")


@dataclass(frozen=True)
class ShapePatch:
    """One object: its class, and its visible pixels as a patch of the image."""

    label: int
    top: int
    left: int
    mask: NDArray[np.bool_]


class ShapesDataset:
    def __init__(self, config: ShapesConfig, split: str, masks: bool = False) -> None:
        """
        Args:
            masks: whether the index has the masks of objects: their visible pixels.
        """
        if split not in SPLITS:
            raise ValueError(f"shapes has the splits {', '.join(SPLITS)}, not {split!r}")
        self.config, self.split, self.masks = config, split, masks
        self.name = f"shapes-{split}"
        self.images = config.images or (3200 if split == "train" else 400)

    @cached_property
    def index(self) -> AnnotationIndex:
        layouts = [self._layout(i) for i in range(self.images)]
        patches = [patch for layout in layouts for patch in layout]
        boxes = np.array([_box(patch) for patch in patches], dtype=np.float32).reshape(-1, 4)
        return AnnotationIndex.build(
            image_ids=np.arange(1, self.images + 1),
            files=[f"shapes/{self.split}/{i:06d}" for i in range(self.images)],
            sizes=np.full((self.images, 2), self.config.size),
            counts=np.array([len(layout) for layout in layouts]),
            boxes_xyxy=boxes,
            labels=np.array([patch.label for patch in patches], dtype=np.int32),
            areas=np.array([patch.mask.sum() for patch in patches], dtype=np.float32),
            classes=CLASSES[: self.config.classes],
            category_ids=tuple(range(1, self.config.classes + 1)),
            masks=Masks.of_pixels(_on_canvas(patch, self.config.size) for patch in patches) if self.masks else None,
        )

    def load_image(self, position: int) -> NDArray[np.uint8]:
        """RGB [size, size, 3]."""
        rng = self._rng(position, stream=1)
        size = self.config.size
        canvas = _texture(rng, size, size, contrast=22.0, colour=rng.uniform(40, 215, 3))
        for patch in self._layout(position):
            height, width = patch.mask.shape
            rows, columns = slice(patch.top, patch.top + height), slice(patch.left, patch.left + width)
            behind = canvas[rows, columns][patch.mask].mean(0)
            paint = _texture(rng, height, width, contrast=12.0, colour=_contrasting(rng, behind))
            canvas[rows, columns][patch.mask] = paint[patch.mask]
        canvas += rng.normal(0, 4, canvas.shape).astype(np.float32)
        return canvas.clip(0, 255).astype(np.uint8)

    def _rng(self, position: int, stream: int) -> np.random.Generator:
        return np.random.default_rng((self.config.seed, SPLITS[self.split], position, stream))

    def _layout(self, position: int) -> list[ShapePatch]:
        """Objects from back to front; one that would hide another, or be hidden, is left out."""
        rng = self._rng(position, stream=0)
        size = self.config.size
        owner = np.full((size, size), -1, dtype=np.int16)
        placed: list[tuple[int, int, int, NDArray[np.bool_]]] = []
        for _ in range(rng.integers(1, self.config.most + 1)):
            label = int(rng.integers(self.config.classes))
            side = _side(rng, size)
            mask = outline(label, side, rng.uniform(-0.3, 0.3))
            top, left = (int(rng.integers(0, size - length + 1)) for length in mask.shape)
            window = owner[top : top + mask.shape[0], left : left + mask.shape[1]]
            if _hides(window[mask], owner, placed):
                continue
            window[mask] = len(placed)
            placed.append((label, top, left, mask))
        return [_visible(owner, number, *entry) for number, entry in enumerate(placed)]


def _side(rng: np.random.Generator, size: int) -> int:
    """Diameter in pixels: small ones stay well below 32, so that their boxes do whatever the rotation."""
    if rng.random() < SMALL_SHARE:
        return int(rng.integers(15, 28))
    return int(np.exp(rng.uniform(np.log(size / 5), np.log(size / 2.4))))


def outline(label: int, side: int, turn: float) -> NDArray[np.bool_]:
    """The class's filled outline in its tight box; `turn` in radians."""
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1
    y0, x0 = axis[:, None], axis[None, :]
    cos, sin = np.cos(turn), np.sin(turn)
    x, y = x0 * cos - y0 * sin, x0 * sin + y0 * cos
    radius = np.hypot(x, y)
    match CLASSES[label]:
        case "disc":
            mask = radius < 1
        case "square":
            mask = np.maximum(np.abs(x), np.abs(y)) < 0.72
        case "triangle":
            mask = (y < 0.5) & (y > -1 + 1.732 * np.abs(x))
        case "cross":
            mask = (np.minimum(np.abs(x), np.abs(y)) < 0.27) & (np.maximum(np.abs(x), np.abs(y)) < 0.92)
        case "ring":
            mask = (radius < 1) & (radius > 0.55)
        case _:
            # the edge of a five-pointed star swings between an outer and an inner radius
            phase = np.abs((np.arctan2(x, -y) / (2 * np.pi) * 5 + 0.5) % 1 - 0.5) * 2
            mask = radius < 1 / (1 + 1.6 * phase)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _hides(covered: NDArray[np.int16], owner: NDArray[np.int16], placed: list[tuple[int, int, int, NDArray[np.bool_]]]) -> bool:
    for number in np.unique(covered[covered >= 0]):
        mask = placed[number][3]
        if (owner == number).sum() - (covered == number).sum() < VISIBLE_SHARE * mask.sum():
            return True
    return False


def _visible(owner: NDArray[np.int16], number: int, label: int, top: int, left: int, mask: NDArray[np.bool_]) -> ShapePatch:
    seen = owner[top : top + mask.shape[0], left : left + mask.shape[1]] == number
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    return ShapePatch(label, top + int(rows[0]), left + int(columns[0]), seen[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def _box(patch: ShapePatch) -> tuple[int, int, int, int]:
    height, width = patch.mask.shape
    return patch.left, patch.top, patch.left + width, patch.top + height


def _on_canvas(patch: ShapePatch, size: int) -> NDArray[np.bool_]:
    """[size, size] the visible pixels of an object."""
    left, top, right, bottom = _box(patch)
    canvas = np.zeros((size, size), bool)
    canvas[top:bottom, left:right] = patch.mask
    return canvas


def _contrasting(rng: np.random.Generator, behind: NDArray[np.float32]) -> NDArray[np.float64]:
    """A random colour, of any class alike, that stands out from what it covers."""
    while True:
        colour = rng.uniform(0, 255, 3)
        if np.abs(colour - behind).max() > 90:
            return colour


def _texture(rng: np.random.Generator, height: int, width: int, contrast: float, colour: NDArray[np.float64]) -> NDArray[np.float32]:
    """Waves in random directions around a colour, [height, width, 3]."""
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)[None, :]
    waves = np.zeros((height, width), dtype=np.float32)
    for angle, period, phase in zip(rng.uniform(0, np.pi, 3), rng.uniform(6, 50, 3), rng.uniform(0, 6.28, 3), strict=True):
        waves += np.sin((x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))) * np.float32(6.28 / period) + np.float32(phase))
    tint = rng.uniform(0.5, 1.0, 3)
    return (colour + waves[..., None] * (contrast / 1.7 * tint)).astype(np.float32)
