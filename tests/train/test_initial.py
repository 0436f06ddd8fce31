"""A run that starts from another one's weights: the right ones, told by its id, and never by mistake."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launching import Cli, Run, read_events
from torch import nn

from orchestrator.bundle import Initial, freeze, run_id
from orchestrator.compose import compose
from orchestrator.errors import CheckpointError
from orchestrator.model.zoo import build_model
from orchestrator.train.checkpoint import open_checkpoint
from orchestrator.train.earlier import tell_earlier
from orchestrator.train.initial import find_initial, start_from
from orchestrator.train.state import hash_tensors

pytestmark = pytest.mark.timeout(200)


def network(classes: int = 4, name: str = "cifar_resnet20") -> nn.Module:
    return build_model(compose(["data=synthetic", f"model={name}"]).config.model, classes)


def initial_of(run: Run) -> Initial:
    found = find_initial(compose([f"init_from={run.folder}:best"]).config)
    assert found is not None
    return found


def test_the_moving_average_is_what_a_run_starts_from(trained: Run) -> None:
    initial, net = initial_of(trained), network()
    told = start_from(initial, net)
    averaged = open_checkpoint(Path(initial.path)).load_weights()
    assert initial.weights_sha256 == hash_tensors(averaged) != trained.result["weights_sha256"]
    assert all(torch.equal(net.state_dict()[name], averaged[name]) for name in averaged)
    assert told.startswith(f"init_from: weights of {initial.path}/ema.safetensors")


def test_a_head_of_another_size_stays_and_that_is_told(trained: Run) -> None:
    initial, net = initial_of(trained), network(classes=7)
    head = {name: value.clone() for name, value in net.state_dict().items() if value.shape[:1] == (7,)}
    assert "except the head, which has another size" in start_from(initial, net)
    assert head
    assert all(torch.equal(net.state_dict()[name], value) for name, value in head.items())


def test_another_model_is_refused(trained: Run) -> None:
    with pytest.raises(CheckpointError, match="checkpoint of another model"):
        start_from(initial_of(trained), network(name="cifar_resnet32"))


def test_weights_that_changed_since_the_run_was_frozen_are_refused(trained: Run) -> None:
    with pytest.raises(CheckpointError, match="other weights than when this run was frozen"):
        start_from(replace(initial_of(trained), weights_sha256="0" * 64), network())


def test_the_id_tells_the_weights_and_not_their_place(trained: Run) -> None:
    config = compose([]).config
    one, two = initial_of(trained), replace(initial_of(trained), weights_sha256="1" * 64)
    ids = {run_id(config), run_id(config, one), run_id(config, two), run_id(config, replace(one, path="elsewhere"))}
    assert len(ids) == 3


def test_a_run_starts_from_another_and_goes_on_by_itself_where_that_one_is_changed_later(
    cli: Cli, small: tuple[str, ...], trained: Run
) -> None:
    source = cli.cwd / "source"
    shutil.copytree(trained.folder, source)
    command = ("train", *small, "name=second", "recipe.ema_decay=0.9", f"init_from={source}:last", "--json")
    answer = cli(*command)
    assert answer.code == 0, answer.err
    assert "init_from: weights of" in answer.err
    folder = cli.cwd / "runs" / answer.json()["run_id"]
    frozen = json.loads((folder / "run.json").read_text())["initial"]
    assert frozen["weights_sha256"] == hash_tensors(open_checkpoint(Path(frozen["path"])).load_weights())
    losses = [event["train/loss"] for path in (folder, trained.folder) for event in read_events(path)[1:4]
              if event["kind"] == "step"]  # fmt: skip
    assert losses[0] < losses[-1]


@pytest.mark.parametrize(
    ("text", "rule"),
    [("absent:best", "is no path and no run in"), ("{file}", "is a file, and a run starts from a checkpoint's folder")],
)
def test_what_is_no_checkpoint_is_the_users_mistake(cli: Cli, text: str, rule: str, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"")
    answer = cli("train", "data=synthetic", f"init_from={text.format(file=tmp_path / 'x.pt')}", "--dry-run")
    assert answer.code == 42
    assert "init_from = " in answer.err
    assert rule in answer.err
    assert "Way out" in answer.err


def test_two_sources_of_first_weights_are_refused(cli: Cli) -> None:
    answer = cli("train", "data=synthetic", "init_from=a:best", "model.weights=x.pt", "--dry-run")
    assert answer.code == 42
    assert "init_from = a:best: gives the first weights, and so does model.weights = x.pt" in answer.err


class TestEarlier:
    def earlier(self, runs: Path, *overrides: str) -> str | None:
        return tell_earlier(freeze(compose(["name=a", f"runs_dir={runs}", *overrides])))

    @pytest.fixture
    def runs(self, tmp_path: Path) -> Path:
        from orchestrator.bundle import write_bundle

        first = freeze(compose(["name=a", f"runs_dir={tmp_path}"]))
        write_bundle(first, first.folder / "run.json", {})
        return tmp_path

    def test_a_new_run_says_which_values_make_it_one(self, runs: Path) -> None:
        told = self.earlier(runs, "recipe.epochs=77")
        assert told is not None
        first = next(runs.iterdir()).name
        assert f"{first} has another recipe.epochs = 77 (there " in told
        assert f"init_from={first}:last" in told

    @pytest.mark.parametrize("same", [(), ("compute.num_processes=2",), ("tracking=online",), ("seed=5",)])
    def test_the_same_run_and_another_seed_say_nothing(self, runs: Path, same: tuple[str, ...]) -> None:
        assert self.earlier(runs, *same) is None

    def test_another_name_and_very_different_values_say_nothing(self, runs: Path) -> None:
        assert tell_earlier(freeze(compose(["name=b", f"runs_dir={runs}", "recipe.epochs=77"]))) is None
        assert self.earlier(runs, "model=resnet50", "recipe=rsb_a3", "data=imagenet", "recipe.epochs=77") is None
