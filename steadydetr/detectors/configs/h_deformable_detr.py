"""Config of H-Deformable-DETR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from steadydetr.config import check_within
from steadydetr.detectors.configs.deformable import DeformableDETRConfig, TransformerConfig, infer_transformer
from steadydetr.kinds import register
from steadydetr.nn.configs import infer_backbone
from steadydetr.nn.named_tensors import NamedTensors

if TYPE_CHECKING:
    from torch import Tensor

    from steadydetr.detectors.h_deformable_detr import HDeformableDETR

H_TRANSFORMER = TransformerConfig(ffn=2048, dropout=0.0)
OFFICIAL = 1500  # one-to-many queries of all official models


@register("h-deformable-detr")
@dataclass(frozen=True)
class HDeformableDETRConfig(DeformableDETRConfig):
    """Defaults: the paper's with all its parts, with R50. Only the objective one-to-many trains the further queries."""

    transformer: TransformerConfig = H_TRANSFORMER
    refine: bool = True
    two_stage: bool = True
    one_to_many_queries: int = OFFICIAL  # besides `queries`, in training alone
    mixed_selection: bool = True  # boxes from the encoder, content learned; False: content from the boxes too. Of two-stage ones
    look_forward_twice: bool = True  # needs `refine`

    def __post_init__(self) -> None:
        super().__post_init__()
        check_within("detector", self, one_to_many_queries=(1, 10**6))
        if self.mixed_selection and not self.two_stage:
            raise ValueError("detector.mixed_selection needs detector.two_stage: a one-stage detector learns its boxes too")
        if self.look_forward_twice and not self.refine:
            raise ValueError("detector.look_forward_twice needs detector.refine: without it no stage starts from the box of another")

    def build(self, num_classes: int) -> HDeformableDETR:
        from steadydetr.detectors.h_deformable_detr import HDeformableDETR

        return HDeformableDETR(self, num_classes)

    @classmethod
    def from_tensors(cls, tensors: NamedTensors) -> Self | None:
        """A two-stage detector with learned content and without position vectors of its own. Others look like Deformable DETR (D-169)."""
        learned = tensors.has("query_position_and_content") and tensors.has("proposal_position.")
        if not learned or tensors.has("decoder.norm.", "decoder.position."):
            return None
        rows = tensors.shape("query_position_and_content")[0]
        queries = rows - OFFICIAL if rows > OFFICIAL else tensors.untraced.queries
        if queries >= rows:
            raise ValueError(f"it learns {rows} queries, of which less than {queries} can be matched one to one: give their number")
        transformer = infer_transformer(tensors, H_TRANSFORMER)
        return cls(backbone=infer_backbone(tensors), transformer=transformer, queries=queries, one_to_many_queries=rows - queries)

    def split_queries(self, joint: Tensor) -> dict[str, Tensor]:
        """The first rows are matched one to one; with mixed selection there is content alone."""
        tensors = {"query_content.weight": joint} if self.mixed_selection else super().split_queries(joint)
        own = {name: tensor[: self.queries] for name, tensor in tensors.items()}
        return own | {name.replace("query_", "query_extra_"): tensor[self.queries :] for name, tensor in tensors.items()}
