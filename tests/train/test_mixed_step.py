"""A mixed step learns the labels of both images, counts hits by the larger share, and erases copies apart."""

from __future__ import annotations

import pytest
import torch
from test_module import CLASSES, make_batch, make_module
from torch.nn import functional as F

from orchestrator.data.stream import Batch
from orchestrator.model.loss import soft_targets
from orchestrator.model.module import Classifier, count_hits

COUNT, UNITS = 12, 12


def mixed_module(*overrides: str) -> Classifier:
    return make_module(overrides=("recipe.cutmix=1.0", "recipe.mixup=0.2", *overrides))


def test_a_mixed_step_has_the_loss_of_both_labels_by_their_shares() -> None:
    module, batch = mixed_module("recipe.label_smoothing=0.1"), make_batch(range(COUNT), COUNT, padding=2)
    apart = 0
    for unit in range(UNITS):
        assert module.mixing is not None
        pixels, targets = module.mixing(batch.images, batch.labels, batch.ids, unit, 0)
        logits, soft = module.net(pixels)[:COUNT], soft_targets(targets, CLASSES)[:COUNT]
        wanted = F.cross_entropy(logits, soft, label_smoothing=0.1)
        torch.testing.assert_close(module.training_step(batch, unit), wanted)
        unmixed = F.cross_entropy(logits, batch.labels[:COUNT], label_smoothing=0.1)
        apart += (wanted - unmixed).abs().item() > 1e-3
    assert apart  # the own labels alone would not do


def test_hits_of_a_mixed_step_are_those_of_the_label_with_the_larger_share() -> None:
    module, batch = mixed_module(), make_batch(range(COUNT), COUNT, padding=2)
    by_partner = differing = 0
    for unit in range(UNITS):
        assert module.mixing is not None
        pixels, targets = module.mixing(batch.images, batch.labels, batch.ids, unit, 0)
        logits = module.net(pixels)[:COUNT]
        first, among = count_hits(logits, targets.dominant[:COUNT])
        module.training_step(batch, unit)
        assert module.take_tally()[1:4].tolist() == [int(first.sum()), int(among.sum()), COUNT]
        by_partner += targets.dominant is targets.partner
        differing += [int(hits.sum()) for hits in count_hits(logits, batch.labels[:COUNT])] != [
            int(first.sum()),
            int(among.sum()),
        ]
    assert 0 < by_partner < UNITS
    assert differing


@pytest.mark.parametrize("border", [3, 5, 8])
def test_copies_of_a_sample_are_erased_apart_and_alike_on_both_sides_of_a_ranks_border(border: int) -> None:
    module = make_module(overrides=("recipe.erase=1.0",))
    images, repeats = torch.full((12, 3, 48, 48), 200, dtype=torch.uint8), 4
    ids = torch.arange(3).repeat_interleave(repeats)
    drawn = ids * repeats + torch.arange(repeats).repeat(3)

    def prepared(rows: slice) -> torch.Tensor:
        batch = Batch(images[rows], ids[rows], ids[rows], 12, 0, drawn[rows])
        return module._prepare(module.on_before_batch_transfer(batch, 0), 0)[0]

    whole = prepared(slice(None))
    for copies in whole.split(repeats):
        assert len({copy.numpy().tobytes() for copy in copies}) == repeats
    assert torch.equal(torch.cat([prepared(slice(border)), prepared(slice(border, None))]), whole)
