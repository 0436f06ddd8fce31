"""What a step computes depends on its samples alone: not on how many ranks and parts share them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from orchestrator.compose import compose
from orchestrator.config import RunConfig
from orchestrator.data.order import cut
from orchestrator.data.stream import PAD, Batch
from orchestrator.model.module import Classifier, Normalise, Span, count_hits
from orchestrator.model.optim import learning_rate_factor

CLASSES, SIDE, STEPS = 7, 6, 6
Weights = dict[str, torch.Tensor]


def make_batch(samples: range, step_size: int, padding: int = 0) -> Batch:
    """Samples of a fixed made-up set by number, and rows of padding after them."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (100, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (100,), generator=generator)
    rows = list(samples)
    images = torch.cat([pixels[rows], torch.full((padding, 3, SIDE, SIDE), 255, dtype=torch.uint8)])
    ids = torch.tensor(rows + [PAD] * padding)
    return Batch(images, torch.cat([labels[rows], torch.zeros(padding, dtype=torch.int64)]), ids, step_size, 0)


@cache
def config_of(overrides: tuple[str, ...]) -> RunConfig:
    return compose(["recipe.warmup_epochs=0", "recipe.epochs=3", *overrides]).config


def make_module(world_size: int = 1, rank: int = 0, overrides: tuple[str, ...] = ()) -> Classifier:
    config = config_of(overrides)
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * (SIDE - 2) ** 2, CLASSES))
    return Classifier(net, config, Span(0, STEPS, 2, rank, world_size))


def gradients(module: Classifier) -> Weights:
    return {name: p.grad.clone() for name, p in module.net.named_parameters() if p.grad is not None}


def whole_step_gradients(samples: range, label_smoothing: float = 0.0) -> Weights:
    """By the definition: the mean of the losses of all samples of the step."""
    module, batch = make_module(), make_batch(samples, len(samples))
    logits = module.net(module.normalise(batch.images))
    F.cross_entropy(logits, batch.labels, label_smoothing=label_smoothing).backward()
    return gradients(module)


def require_close(a: Weights, b: Weights) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("world_size", "accumulate"), list(product((1, 2, 3, 5), (1, 2, 3))))
@pytest.mark.parametrize("count", [17, 20])
def test_uneven_slices_of_ranks_and_parts_give_the_gradient_of_the_whole_step(
    world_size: int, accumulate: int, count: int
) -> None:
    if count < world_size * accumulate:
        pytest.skip("some part would be empty, which the plan refuses")
    samples, summed = range(count), {}
    for rank in range(world_size):
        module = make_module(world_size, rank, (f"recipe.accumulate={accumulate}",))
        mine = samples[cut(count, world_size, rank)]
        for part in range(accumulate):
            loss = module.training_step(make_batch(mine[cut(len(mine), accumulate, part)], count), part)
            (loss / accumulate).backward()  # as Lightning does
        for name, gradient in gradients(module).items():
            summed[name] = summed.get(name, 0) + gradient / world_size  # as DDP does
    require_close(summed, whole_step_gradients(samples))


def test_rows_of_padding_carry_no_weight() -> None:
    module = make_module()
    module.training_step(make_batch(range(9), 9, padding=5), 0).backward()
    require_close(gradients(module), whole_step_gradients(range(9)))
    assert float(module.take_tally()[3]) == 9


def test_label_smoothing_is_the_recipes() -> None:
    module = make_module(overrides=("recipe.label_smoothing=0.3",))
    module.training_step(make_batch(range(9), 9), 0).backward()
    require_close(gradients(module), whole_step_gradients(range(9), label_smoothing=0.3))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_without_mixing_a_step_has_the_bits_of_the_plain_formula(smoothing: float) -> None:
    module, batch = make_module(overrides=(f"recipe.label_smoothing={smoothing}",)), make_batch(range(9), 9, padding=2)
    found = module.training_step(batch, 0)
    mean, std = (255 * torch.tensor(v).view(1, 3, 1, 1) for v in (module.config.data.mean, module.config.data.std))
    logits = module.net((batch.images.float() - mean) / std)
    losses = F.cross_entropy(logits, batch.labels, reduction="none", label_smoothing=smoothing)
    assert torch.equal(found, (losses * (batch.ids >= 0)).sum() * (1 / 9))
    assert module.mixing is None


MIXED = ("recipe.mixup=0.2", "recipe.cutmix=1.0", "recipe.erase=0.5")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_mixed_step_has_the_same_bits_in_a_run_that_starts_there(accumulate: int) -> None:
    overrides = (*MIXED, f"recipe.accumulate={accumulate}")
    whole, resumed = make_module(overrides=overrides), make_module(overrides=overrides)
    resumed.span = Span(4, STEPS, 2, 0, 1)
    losses = [whole.training_step(make_batch(range(12), 12), unit) for unit in range(6 * accumulate)]
    for unit in range(2 * accumulate):
        found = resumed.training_step(make_batch(range(12), 12), unit)
        assert torch.equal(found, losses[4 * accumulate + unit])
    assert len({loss.item() for loss in losses}) == len(losses)


def test_the_tally_sums_loss_hits_and_samples_and_starts_anew() -> None:
    module = make_module()
    batches = [make_batch(range(9), 9), make_batch(range(9, 20), 11, padding=2)._replace(skipped=3)]
    for number, batch in enumerate(batches):
        module.training_step(batch, number)
    loss, hits1, hits5, count, skipped = module.take_tally().tolist()
    whole = make_batch(range(20), 20)
    logits = module.net(module.normalise(whole.images))
    first, among = count_hits(logits, whole.labels)
    assert (hits1, hits5, count, skipped) == (int(first.sum()), int(among.sum()), 20, 3)
    assert loss == pytest.approx(float(F.cross_entropy(logits, whole.labels, reduction="sum").detach()), rel=1e-5)
    assert module.take_tally().tolist() == [0, 0, 0, 0, 0]
    module.add_tally([1.5, 2, 3, 4, 5])
    assert module.take_tally().tolist() == [1.5, 2, 3, 4, 5]


class Recorded(pl.Callback):
    """The learning rate of each optimizer step as the optimizer had it."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: object) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])  # pyright: ignore[reportAttributeAccessIssue]


def fit(module: Classifier, accumulate: int, steps: range) -> list[float]:
    def batches() -> Iterator[Batch]:
        for step in steps:
            samples = range(step * 12, step * 12 + 12)
            for part in range(accumulate):
                yield make_batch(samples[cut(12, accumulate, part)], 12)

    recorded = Recorded()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, accumulate_grad_batches=accumulate, callbacks=[recorded],
        barebones=True,
    )  # fmt: skip
    trainer.fit(module, train_dataloaders=DataLoader(list(batches()), batch_size=None))  # pyright: ignore[reportArgumentType]
    return recorded.rates


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:.*barebones.*")
@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
class TestFit:
    """Through Lightning's own loop."""

    @pytest.mark.parametrize("accumulate", [2, 3])
    def test_parts_of_a_step_train_the_same_weights_as_the_step_at_once(self, accumulate: int) -> None:
        once, parts = make_module(), make_module(overrides=(f"recipe.accumulate={accumulate}",))
        assert len(fit(once, 1, range(STEPS))) == len(fit(parts, accumulate, range(STEPS))) == STEPS
        require_close(dict(parts.net.named_parameters()), dict(once.net.named_parameters()))
        assert once.step == parts.step == STEPS

    @pytest.mark.parametrize("schedule", ["cosine", "linear", "step", "constant"])
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_each_step_has_the_rate_that_the_schedule_names(self, schedule: str, accumulate: int) -> None:
        overrides = (
            f"recipe.schedule={schedule}", f"recipe.accumulate={accumulate}", "recipe.warmup_epochs=1.5",
            "recipe.step_epochs=[2]", "recipe.global_batch_size=64", "optimizer.lr=0.4",
            "optimizer.base_batch_size=128",
        )  # fmt: skip
        module = make_module(overrides=overrides)
        rates = fit(module, accumulate, range(STEPS))
        factors = [learning_rate_factor(module.config.recipe, step, 2, STEPS) for step in range(STEPS)]
        assert rates == pytest.approx([0.2 * factor for factor in factors])
        assert len(set(rates)) > 1

    def test_a_mixed_run_trains_by_numbers_read_on_the_host_before_the_transfer(self) -> None:
        first, again = make_module(overrides=MIXED), make_module(overrides=MIXED)
        fit(first, 1, range(STEPS))
        torch.rand(3)
        fit(again, 1, range(STEPS))
        assert torch.equal(first._host_draws, torch.arange(60, 72))
        for a, b in zip(first.net.parameters(), again.net.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_a_span_that_starts_later_goes_on_with_the_rates(self) -> None:
        whole, rest = make_module(), make_module()
        rest.span = Span(4, STEPS, 2, 0, 1)
        rest.step = 4
        assert fit(rest, 1, range(4, STEPS)) == fit(whole, 1, range(STEPS))[4:]


def test_random_numbers_of_a_batch_depend_on_seed_unit_and_rank_alone() -> None:
    def draw(first_step: int, batch: int, rank: int = 0, seed: int = 0, accumulate: int = 1) -> float:
        module = make_module(2, rank, (f"seed={seed}", f"recipe.accumulate={accumulate}"))
        module.span = Span(first_step, STEPS, 2, rank, 2)
        torch.rand(batch + 3)  # whatever was drawn before does not matter
        module.on_train_batch_start(None, batch)
        return float(torch.rand(()))

    assert draw(0, 5) == draw(3, 2) == draw(5, 0)
    assert draw(0, 5, accumulate=2) == draw(2, 1, accumulate=2)
    assert len({draw(0, 5), draw(0, 4), draw(0, 5, rank=1), draw(0, 5, seed=1)}) == 4


def test_hits_agree_with_a_naive_ranking_and_equal_logits_favour_the_lower_class() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randint(0, 4, (300, 9), generator=generator).float()
    labels = torch.randint(0, 9, (300,), generator=generator)
    order = [sorted(range(9), key=lambda c: (-row[c], c)) for row in logits.tolist()]
    first, among = count_hits(logits, labels)
    assert first.tolist() == [ranked[0] == label for ranked, label in zip(order, labels.tolist(), strict=True)]
    assert among.tolist() == [label in ranked[:5] for ranked, label in zip(order, labels.tolist(), strict=True)]
    assert first.tolist() == (logits.argmax(dim=1) == labels).tolist()


def test_a_row_with_nan_hits_nothing() -> None:
    first, among = count_hits(torch.full((3, 4), float("nan")), torch.tensor([0, 1, 3]))
    assert not first.any()
    assert not among.any()


def test_normalise_maps_pixels_to_mean_zero_in_units_of_std() -> None:
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    values = Normalise([0.0, 0.5, 0.25], [1.0, 0.5, 0.25], channels_last=True)(images).flatten()
    torch.testing.assert_close(values, torch.tensor([0.0, (128 / 255 - 0.5) / 0.5, 3.0]))
