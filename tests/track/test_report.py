"""The page of a run: complete, self-contained, safe and the same every time."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from histories import Costs, Simulation, exponential_kills
from made_up_runs import MadeUpRun

from orchestrator.track import sections
from orchestrator.track.charts import PALETTE, attempt_marks, draw_charts
from orchestrator.track.report import confusion, write_report
from orchestrator.track.runs import RunRecord, history, load_run
from orchestrator.track.spent import Scale, draw_bar, spent
from orchestrator.track.timeline import read_timeline

NASTY = "<script>alert('x')</script>"
VOID = {"meta", "img", "br", "link", "input"}

RUNS = {
    "starting": MadeUpRun(state="starting"),
    "running": MadeUpRun(state="running", epochs=2),
    "failed": MadeUpRun(state="failed", epochs=2),
    "one epoch": MadeUpRun(epochs=1),
    "three attempts": MadeUpRun(resumed_at=(69, 161)),
    "twenty classes": MadeUpRun(classes=[NASTY, *(f"kind {n}" for n in range(19))], photo=96),
    "hundred classes": MadeUpRun(classes=[f"kind {n}" for n in range(100)]),
    "thousand classes": MadeUpRun(classes=[f"kind {n}" for n in range(1000)], photo=224),
}


def page(run: MadeUpRun, folder: Path) -> str:
    return write_report(run.write(folder)).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Collects what a browser would load, and checks that every element is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [v or "" for k, v in attrs if k in {"src", "href", "srcset", "data"}]
        self.sources += [v[1:] for k, v in attrs if k == "xlink:href" and v and not v.startswith("#")]
        self.ids += [v for k, v in attrs if k == "id" and v]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.mark.parametrize("name", RUNS)
def test_the_page_is_whole_small_and_loads_nothing(name: str, tmp_path: Path):
    text = page(RUNS[name], tmp_path / "quickstart-0123abcd")
    assert len(text) < 1_000_000
    read = Page(text)
    assert read.open == []
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(read.tags)
    assert all(source.startswith("data:image/") for source in read.sources)
    assert not re.search(r"@import|url\((?!#)", text)
    assert len(read.ids) == len(set(read.ids))
    assert "quickstart-0123abcd" in text
    assert not any(f"{colour};" in text or f'{colour}"' in text for colour in PALETTE)


def test_the_same_record_gives_the_same_bytes(tmp_path: Path):
    folder = RUNS["three attempts"].write(tmp_path / "r")
    first = write_report(folder).read_bytes()
    (folder / "report.html").unlink()
    assert write_report(folder).read_bytes() == first
    assert sorted(p.name for p in folder.glob("report*")) == ["report.html"]


def test_what_users_name_is_text_and_never_markup(tmp_path: Path):
    run = MadeUpRun(classes=[NASTY, '"><img src=x onerror=alert(1)>', "a & b"], overrides=(f"name={NASTY}",))
    folder = run.write(tmp_path / "r")
    result = (folder / "result.json").read_text().replace('"state": "done"', f'"state": "failed", "error": "{NASTY}"')
    (folder / "result.json").write_text(result)
    read = Page(write_report(folder).read_text())
    assert "script" not in read.tags
    assert all(source.startswith("data:image/") for source in read.sources)
    assert NASTY in "".join(read.text)


def test_the_verdict_states_counts_checkpoints_and_commands(tmp_path: Path):
    text = "".join(Page(page(MadeUpRun(), tmp_path / "quickstart-0123abcd")).text)
    place = "runs/quickstart-0123abcd/checkpoints/step_00000230"
    for words in ("98.33 %", "354 of 360 images right", "top-5 100.00 %", "1 min 32 s", place,
                  f"orchestrator evaluate checkpoint={place}", f"orchestrator predict checkpoint={place} IMAGE",
                  "orchestrator train experiment=quickstart optimizer.lr=0.02"):  # fmt: skip
        assert words in text


def test_a_failed_run_shows_its_error_first_and_how_to_go_on(tmp_path: Path):
    text = "".join(Page(page(RUNS["failed"], tmp_path / "r")).text)
    assert "It failed on rank 1 with exit code 43" in text
    assert text.index("CUDA out of memory") < text.index("Top-1, validation")
    assert "Go on where it stopped" in text


def test_secrets_in_the_config_stay_out_of_the_page(tmp_path: Path):
    text = page(MadeUpRun(), tmp_path / "r")
    assert "s3://...@bucket/train?..." in text
    assert "secret" not in text


def test_values_that_somebody_set_stand_before_presets_and_defaults(tmp_path: Path):
    rows = sections.config_rows(load_run(MadeUpRun().write(tmp_path / "r")))
    assert [(key, source) for key, _, source in rows["chosen"]] == [
        ("data.train", "override"),
        ("optimizer.lr", "override"),
        ("name", "experiment/quickstart.yaml"),
        ("recipe.epochs", "recipe/short.yaml"),
        ("recipe.global_batch_size", "experiment/quickstart.yaml"),
    ]
    assert [key for key, _, _ in rows["default"]] == ["seed", "optimizer.momentum", "optimizer.betas"]
    assert ("optimizer.betas", "[0.9, 0.999]", "optimizer/defaults.yaml") in rows["default"]


def test_the_confusion_matrix_shows_every_count_up_to_twenty_classes(tmp_path: Path):
    run = RUNS["twenty classes"]
    shown = confusion({"confusion": run.confusion(), "classes": run.classes})
    assert shown is not None
    assert [[cell["count"] for cell in row["cells"]] for row in shown["rows"]] == run.confusion()
    assert all(cell["hit"] == (i == j) for i, row in enumerate(shown["rows"]) for j, cell in enumerate(row["cells"]))


def test_many_classes_get_a_picture_or_their_most_confused_pairs(tmp_path: Path):
    hundred = page(RUNS["hundred classes"], tmp_path / "hundred")
    assert 'alt="confusion matrix of 100 classes"' in hundred
    thousand = page(RUNS["thousand classes"], tmp_path / "thousand")
    assert "Confusion matrix" not in thousand
    assert thousand.count("<tr><td>kind ") == 20
    assert "The other 980 classes are at" in thousand


def test_classes_without_a_sample_are_no_bars_and_no_division_by_zero():
    record = {"per_class": [{"name": "a", "hits": 0, "count": 0}, {"name": "b", "hits": 1, "count": 2}]}
    assert [bar["name"] for bar in sections.class_bars(record)["bars"]] == ["b"]
    empty = confusion({"confusion": [[0, 0], [1, 1]], "classes": ["a", "b"]})
    assert empty is not None
    assert [cell["shade"] for cell in empty["rows"][0]["cells"]] == [0.0, 0.0]


def test_attempts_are_marked_where_they_went_on():
    events = MadeUpRun(resumed_at=(69, 161)).events()
    assert attempt_marks(history(events), events) == [(3.0, 2), (7.0, 3)]
    rows = sections.attempts(RunRecord(Path("r"), result={"state": "done"}, events=events))
    assert [row["steps"] for row in rows] == ["0 → 80", "69 → 170", "161 → 230"]
    assert [row["ended"] for row in rows] == ["killed or crashed", "killed or crashed", "done"]


def test_reading_is_told_for_each_epoch_once_something_was_fetched_tried_again_or_lost():
    quiet = {"kind": "data", "attempt": 1, "data/retries": 0, "data/samples_lost": 0}
    events = [{**quiet, "step": step, "epoch": step / 10} for step in (10, 20)]
    assert sections.reading(RunRecord(Path("r"), events=events)) == []
    events += [{**quiet, "step": 30, "epoch": 3.0, "data/retries": 1234, "data/gib_fetched": 0.1234}]
    rows = sections.reading(RunRecord(Path("r"), events=events))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert rows[2] == {
        "epoch": "3", "shards fetched": "0", "GiB": "0.123", "retries": "1,234", "shards damaged": "0",
        "samples lost": "0",
    }  # fmt: skip


def test_a_stopped_attempt_says_by_what():
    endings = [{"kind": "stop", "exit_code": 143}, {"kind": "stop", "reason": "SIGINT"}, {"kind": "stop"}, {}]
    events = [{"t": 1.0, "kind": "step", "step": 1, "attempt": n, **end} for n, end in enumerate(endings)]
    rows = sections.attempts(RunRecord(Path("r"), result={"state": "running"}, events=events))
    told = ["stopped by SIGTERM after saving", "stopped: SIGINT", "stopped on request", "going on"]
    assert [row["ended"] for row in rows] == told


def test_each_curve_is_drawn_once_it_has_a_point_and_a_single_point_is_visible():
    events = [{"kind": "eval", "attempt": 1, "step": 23, "epoch": 1, "val/loss": 0.5, "t": 1.0}]
    (chart,) = draw_charts(events, events)
    assert chart.legend == [("var(--c2)", "validation", "0.5")]
    assert "<use " in chart.svg


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_run_that_diverged_has_a_page_that_says_so(loss: float, tmp_path: Path):
    folder = MadeUpRun(epochs=1).write(tmp_path / "r")
    line = {"kind": "step", "attempt": 1, "step": 20, "epoch": 0.9, "t": 1.0, "train/loss": loss}
    (folder / "events" / "rank_0.jsonl").write_text(json.dumps(line) + "\n")
    assert f"train <b>{loss}</b>" in write_report(folder).read_text()


def test_an_evaluation_alone_names_its_checkpoint_and_no_training(tmp_path: Path):
    folder = MadeUpRun().write(tmp_path / "evaluate-00000000")
    shutil.rmtree(folder / "events")
    result = {"state": "done", "checkpoint": "runs/a b/checkpoints/step_1", "seconds": {"all": 2.0}}
    (folder / "result.json").write_text(json.dumps(result))
    text = "".join(Page(write_report(folder).read_text()).text)
    assert "orchestrator evaluate 'checkpoint=runs/a b/checkpoints/step_1'" in text
    assert "orchestrator train" not in text
    assert "Curves" not in text


def test_lost_or_unreadable_pictures_leave_a_place_and_no_error(tmp_path: Path):
    folder = MadeUpRun().write(tmp_path / "r")
    shutil.rmtree(folder / "samples")
    (folder / "samples").mkdir()
    (folder / "samples" / "worst_00.png").write_bytes(b"not a picture")
    assert write_report(folder).read_text().count("no picture") == 24


def test_the_page_is_written_in_three_seconds_from_a_cold_start(tmp_path: Path):
    folder = MadeUpRun().write(tmp_path / "r")
    script = "import sys; from pathlib import Path; from orchestrator.track.report import write_report as w; "
    script += "assert 'matplotlib' not in sys.modules and 'PIL' not in sys.modules; w(Path(sys.argv[1]))"
    command = [sys.executable, "-c", script, str(folder)]
    assert any(cpu_seconds(command) < 3.0 for _ in range(2))
    assert (folder / "report.html").exists()


def cpu_seconds(command: list[str]) -> float:
    """CPU time of a child: what it takes on an idle machine, whatever else runs now."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def of_history(played: Simulation, prices: list[str] | None = None) -> RunRecord:
    bundle = {"config": {"cluster": {"prices": prices or [], "currency": "EUR"}}}
    peers = {rank: events for rank, events in played.ranks.items() if rank}
    return RunRecord(Path("r"), bundle, {"state": "done"}, played.ranks[0], peers=peers, launcher=played.launcher)


class TestTime:
    """The bar over the wall time, the table of its split, the faults."""

    def test_the_shares_and_the_sum_of_the_table_are_those_of_the_split(self):
        kills = iter([4.0, 5.0])
        played = Simulation(Costs(), lambda: next(kills, float("inf"))).play()
        told = spent(of_history(played, ["cpu=3.6"]))
        assert told is not None
        *parts, total = told["rows"]
        assert sum(float(row["share"].split()[0]) for row in parts) == pytest.approx(100, abs=0.5)
        assert sum(float(row["cost"].split()[0]) for row in parts) == pytest.approx(
            float(total["cost"].split()[0]), 0.01
        )
        assert total["cost"].endswith(" EUR")
        assert {"lost_work", "recovery", "compute"} <= {row["phase"] for row in parts}
        assert [fault["what"] for fault in told["faults"]] == ["killed by SIGKILL"] * 2
        assert 0 < told["marks"][0] < told["marks"][1] < 100

    def test_the_areas_of_the_bar_are_the_shares_of_the_phases(self):
        played = Simulation(Costs(steps=200), lambda: float("inf")).play()
        record = of_history(played)
        timeline = read_timeline(record.ranks, record.launcher)
        svg = draw_bar(timeline, Scale(timeline))
        areas = {
            phase: sum(int(w) * int(h) for w, h in re.findall(r"M\d+ \d+h(\d+)v(\d+)h-\d+z", path))
            for phase, path in re.findall(r'class="ph-(\w+)" d="([^"]*)"', svg)
        }
        assert sum(areas.values()) == pytest.approx(180 * 100, rel=0.01)
        for phase, seconds in played.truth.items():
            share = seconds / sum(played.truth.values())
            assert areas.get(phase, 0) / (180 * 100) == pytest.approx(share, abs=0.01), phase

    def test_a_night_takes_little_of_the_bar_and_all_of_its_time_in_the_table(self):
        kills = iter([4.0])
        played = Simulation(Costs(), lambda: next(kills, float("inf")), night=1.0).play()
        told = spent(of_history(played))
        assert told is not None
        assert told["shortened"]
        assert told["rows"][0]["phase"] == "idle"
        assert told["rows"][0]["seconds"] == "1 h 0 min"
        (path,) = re.findall(r'class="ph-idle" d="([^"]*)"', told["bar"])
        area = sum(int(w) * int(h) for w, h in re.findall(r"h(\d+)v(\d+)h-", path))
        assert 0.03 < area / (180 * 100) < 0.07

    def test_a_page_with_two_hundred_faults_stays_small_and_names_the_rest(self, tmp_path: Path):
        kills = exponential_kills(3.0, seed=3, most=200)
        played = Simulation(Costs(steps=400, save_every=2), kills).play()
        folder = MadeUpRun().write(tmp_path / "quickstart-0123abcd")
        for rank, events in played.ranks.items():
            (folder / "events" / f"rank_{rank}.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
        (folder / "events" / "launcher.jsonl").write_text("".join(json.dumps(e) + "\n" for e in played.launcher))
        text = write_report(folder).read_text()
        assert len(text) < 1_000_000
        assert Page(text).open == []
        assert f"and {played.kills - 12} more" in text
        assert text.count('class="fault"') == played.kills

    def test_events_without_phases_draw_nothing(self):
        assert spent(RunRecord(Path("r"), events=MadeUpRun().events())) is None
        assert spent(RunRecord(Path("r"))) is None
