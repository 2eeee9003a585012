"""Several models of the same data that answer together: one module, called as any of them is.

    model = Ensemble([first, second])
    model.mean_output = task_mean                          # [outputs of each] -> the output that stands for their mean
    model(x, mask)                                         # that output
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_model import Modal, PerceiverModel


class Ensemble(nn.Module):
    """Models with the same arguments, which read the same tokens. Their answers are put together by `mean_output`.

    Args:
        members: two or more.

    Attributes:
        mean_output: makes one output (B, ...) of those of the members; the task says how (`Task.mean_output`).
    """

    mean_output: Callable[[Sequence[Tensor]], Tensor]

    def __init__(self, members: Sequence[PerceiverModel]):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.head = members[0].head

    @property
    def modalities(self) -> nn.ModuleDict:
        return self.members[0].modalities

    def forward(
        self, x: Modal, mask: Modal | None = None, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Answer a batch. Arguments and results as of `PerceiverModel`; attention maps are the means of the members'.
        """
        if not return_attention:
            return self.mean_output([member(x, mask) for member in self.members])
        answers, maps = zip(*(member(x, mask, return_attention=True) for member in self.members), strict=True)
        return self.mean_output(answers), [torch.stack(each).mean(0) for each in zip(*maps, strict=True)]

    def pooled_latents(self, x: Modal, mask: Modal | None = None) -> Tensor:
        """The pooled latents of all members side by side, (B, members * D)."""
        return torch.cat([member.pooled_latents(x, mask) for member in self.members], 1)

    def token_ranges(self, x: Modal) -> dict[str, Any]:
        """Where the tokens of each modality lie in the attention maps, see `PerceiverModel.token_ranges`."""
        return self.members[0].token_ranges(x)
