"""Run folders as a training leaves them, made up but consistent: every count, step and second adds up."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

STEPS_PER_EPOCH = 23
DEFAULTS = "conf/optimizer/defaults.yaml"
PRESET = "conf/model/resnet18_small.yaml"
SECONDS = {"import": 2.1, "start": 1.3, "data_wait": 1.4, "compute": 73.0, "evaluate": 6.2, "save": 1.5, "other": 0.9}


@dataclass(kw_only=True)
class MadeUpRun:
    """What a folder is to look like; `resumed_at` lists the steps at which later attempts went on."""

    classes: list[str] = field(default_factory=lambda: [str(n) for n in range(10)])
    epochs: int = 10
    state: str = "done"
    resumed_at: tuple[int, ...] = ()
    photo: int = 8
    overrides: tuple[str, ...] = ("experiment=quickstart", "optimizer.lr=0.02")

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / "events").mkdir()
        (folder / "samples").mkdir()
        put(folder / "run.json", self.bundle(folder.name))
        if self.state == "starting":
            return folder
        events = self.events()
        (folder / "events" / "rank_0.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        put(folder / "result.json", self.result(folder.name))
        if self.state == "done":
            put(folder / "evaluation.json", self.evaluation(folder))
        return folder

    def bundle(self, run_id: str) -> dict[str, Any]:
        config = {
            "name": "quickstart",
            "seed": 0,
            "data": {"name": "digits", "train": "s3://key:secret@bucket/train?sig=abc", "flip": 0.0},
            "model": {"name": "resnet18", "stem": "small"},
            "optimizer": {"kind": "sgd", "lr": 0.02, "momentum": 0.9, "betas": [0.9, 0.999]},
            "recipe": {"epochs": self.epochs, "global_batch_size": 64},
        }
        sources = {
            "name": "conf/experiment/quickstart.yaml", "seed": "conf/config.yaml", "data.name": "conf/data/digits.yaml",
            "data.train": "override", "data.flip": "conf/data/digits.yaml", "model.name": PRESET, "model.stem": PRESET,
            "optimizer.kind": "conf/optimizer/sgd.yaml",
            "optimizer.lr": "override", "optimizer.momentum": DEFAULTS, "optimizer.betas": DEFAULTS,
            "recipe.epochs": "conf/recipe/short.yaml", "recipe.global_batch_size": "conf/experiment/quickstart.yaml",
        }  # fmt: skip
        data = {"location": "data/digits/train", "digest": "55fc50ba" * 8, "num_classes": len(self.classes)}
        return {
            "schema": 1, "run_id": run_id, "name": "quickstart", "config": config, "sources": sources,
            "overrides": list(self.overrides), "config_hash": "13e5e0f5" * 8, "code_digest": "b783ac80" * 8,
            "lock_digest": "92b810e3" * 8, "versions": {"torch": "2.14.1", "pytorch-lightning": "2.6.6"},
            "git": {"commit": "f3f25e9177f14f79d73a94564f92ccb7a25b3818", "branch": "main", "dirty": True},
            "machine": {"system": "Linux-6.1-x86_64", "python": "3.11.7", "cpus": 2},
            "data": {"train": {**data, "num_samples": 1437}, "val": {**data, "num_samples": 360}},
        }  # fmt: skip

    def events(self) -> list[dict[str, Any]]:
        """Each attempt goes on at a step of `resumed_at`, after the one before had gone 12 steps further."""
        last = self.epochs * STEPS_PER_EPOCH
        begins = [0, *self.resumed_at]
        ends = [*(step + 12 for step in self.resumed_at), last]
        events, now = [], 1.8e9
        for attempt, (begin, end) in enumerate(zip(begins, ends, strict=True), start=1):
            now += 20
            events.append({"t": now, "attempt": attempt, "kind": "start", "step": begin, "world_size": 2})
            for step in range(begin + 1, end + 1):
                now += 0.4
                events += [{"t": now, "attempt": attempt, **event} for event in self.step(step, attempt)]
        if self.state == "done":
            events.append({"t": now, "attempt": len(begins), "kind": "end", "step": last, "exit_code": 0})
        return events

    def step(self, step: int, attempt: int) -> list[dict[str, Any]]:
        done = step / (self.epochs * STEPS_PER_EPOCH)
        epoch = step / STEPS_PER_EPOCH
        wobble = random.Random(1000 * attempt + step)
        loss = 2.3 * math.exp(-3.2 * done) + 0.08 + wobble.gauss(0, 0.03)
        found: list[dict[str, Any]] = []
        if step % 5 == 0:
            found.append({
                "kind": "step", "step": step, "epoch": epoch, "train/loss": loss, "train/acc1": 1 - loss / 2.6,
                "lr": 0.01 * (1 + math.cos(math.pi * done)), "train/images_per_s": 250 + wobble.gauss(0, 12),
                "data_wait_fraction": abs(wobble.gauss(0.02, 0.01)), "cpu_gib": 0.9, "gpu_gib": None,
            })  # fmt: skip
        if step % STEPS_PER_EPOCH == 0:
            hits = round(360 * (1 - 0.9 * math.exp(-4 * done)))
            found.append({
                "kind": "eval", "step": step, "epoch": epoch, "val/loss": loss * 0.9, "val/acc1": fraction(hits, 360),
                "val/acc5": fraction((hits + 360) // 2, 360), "seconds": 0.7,
            })  # fmt: skip
            found.append({"kind": "save", "step": step, "seconds": 0.1, "path": f"checkpoints/step_{step:08d}"})
            found.append({"kind": "saved", "step": step, "write_s": 0.1})
        return found

    def result(self, run_id: str) -> dict[str, Any]:
        step = self.epochs * STEPS_PER_EPOCH
        place = f"runs/{run_id}/checkpoints/step_{step:08d}"
        result: dict[str, Any] = {
            "schema": 1, "run_id": run_id, "state": self.state, "exit_code": None if self.state == "running" else 0,
            "attempts": 1 + len(self.resumed_at), "epoch": float(self.epochs), "step": step, "world_size": 2,
            "metrics": {"val/loss": 0.0845, "val/acc1": fraction(354, 360), "val/acc5": fraction(360, 360)},
            "seconds": SECONDS, "weights_sha256": "ab388066" * 8, "last": place, "best": place,
        }  # fmt: skip
        if self.state == "failed":
            result |= {
                "exit_code": 43,
                "rank": 1,
                "error": "RuntimeError: CUDA out of memory.\nTried to allocate 2 GiB",
            }
        return result

    def evaluation(self, folder: Path) -> dict[str, Any]:
        matrix = self.confusion()
        hits, count = sum(row[i] for i, row in enumerate(matrix)), sum(map(sum, matrix))
        pairs = [(n, i, j) for i, row in enumerate(matrix) for j, n in enumerate(row) if i != j and n]
        names = self.classes
        return {
            "schema": 1, "step": self.epochs * STEPS_PER_EPOCH, "split": "val", "classes": names, "count": count,
            "hits1": hits, "hits5": count, "loss": 0.08, "confusion": matrix if len(names) <= 100 else None,
            "confused_pairs": [
                {"true": names[i], "predicted": names[j], "count": n} for n, i, j in sorted(pairs, reverse=True)[:20]
            ],
            "per_class": [
                {"name": name, "hits": row[i], "count": sum(row)}
                for i, (name, row) in enumerate(zip(names, matrix, strict=True))
            ],
            "worst": [self.sample(folder, "worst", n) for n in range(12)],
            "best": [self.sample(folder, "best", n) for n in range(12)],
        }  # fmt: skip

    def confusion(self) -> list[list[int]]:
        size, luck = len(self.classes), random.Random(7)
        matrix = [[0] * size for _ in range(size)]
        for i in range(size):
            for _ in range(36):
                matrix[i][i if luck.random() > 0.06 + 0.3 * (i % 7 == 3) else (i + luck.choice([1, 2, 5])) % size] += 1
        return matrix

    def sample(self, folder: Path, kind: str, number: int) -> dict[str, Any]:
        luck = random.Random(f"{kind}{number}")
        path = f"samples/{kind}_{number:02d}.png"
        picture(self.photo, luck).save(folder / path)
        label = luck.choice(self.classes)
        wrong = kind == "worst" and number % 3 < 2
        return {
            "key": f"{luck.randrange(10**6):06d}", "label": label, "image": path,
            "predicted": luck.choice([c for c in self.classes if c != label]) if wrong else label,
            "probability": luck.uniform(0.3, 0.8) if wrong else 0.9999, "loss": 2.0 - number / 10 if wrong else 0.001,
        }  # fmt: skip


def picture(side: int, luck: random.Random) -> Image.Image:
    """Noise and a shape: compresses as badly as a photo."""
    image = Image.effect_noise((side, side), 60).convert("RGB")
    corner = luck.randrange(side // 2)
    colour = (luck.randrange(256), luck.randrange(256), luck.randrange(256))
    ImageDraw.Draw(image).ellipse((corner, corner, corner + side // 2, corner + side // 2), fill=colour)
    return image


def fraction(hits: int, count: int) -> dict[str, Any]:
    return {"hits": hits, "count": count, "value": hits / count}


def put(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))
