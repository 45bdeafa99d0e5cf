"""A run and its folder: prepared, logged, saved and finished around the loop of train.py.

config.json      the resolved recipe and the classes of the data
metrics.jsonl    a line per logged step and per evaluation
last/, best/     checkpoints; a run can be resumed from either
summary.json, curves.png, predictions.png, sampling.png
"""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from steadydetr.checkpoints.folder import DetectorCard, find_checkpoint, load_training_state, save_detector
from steadydetr.config import FORMAT, check_format, differences, from_plain, renewed, to_plain, write_json
from steadydetr.data import AnnotationIndex, Dataset, EvalLoader, TrainLoader, first_images, for_training, open_data
from steadydetr.data.dataset import FolderDataset, parts_of
from steadydetr.detectors import Detector
from steadydetr.drawing.run_pictures import draw_curves, draw_predictions
from steadydetr.drawing.sampling_points import draw_sampling_points
from steadydetr.learning.teachers import HORIZON, Average, EMATeacher
from steadydetr.metrics.evaluation import Evaluation, prediction_function
from steadydetr.metrics.stability import Stability
from steadydetr.metrics.table import SUMMARY_NAMES
from steadydetr.nn.decoder import DecoderLayer
from steadydetr.nn.encoder import EncoderLayer
from steadydetr.objectives.method import Method
from steadydetr.recipes.base import Recipe
from steadydetr.runs.records import read_metrics
from steadydetr.training.optimiser import first_drop, make_optimiser
from steadydetr.training.progress import Progress

SLOW = 0.1  # of the run: an average over more of it is hardly the model's


@dataclass
class State:
    """Where the run is; saved with every checkpoint."""

    step: int = 0
    epochs_done: int = 0  # trained and evaluated
    images_seen: int = 0
    seconds: float = 0.0  # of training, without evaluation
    best_ap: float = -1.0
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)  # the latest, by whose weights
    matched: dict[str, Tensor] = field(default_factory=dict)  # who held the targets at the latest evaluation, by whose weights


@dataclass(frozen=True)
class Step:
    """What came of an optimiser step, in this process."""

    losses: dict[str, float]  # weighted, summed over stages and micro-batches
    measures: dict[str, float]  # mean over micro-batches
    norm: float  # of the gradient, before clipping


@dataclass
class Run:
    recipe: Recipe
    output: Path
    accelerator: Accelerator
    val_data: Dataset
    loader: TrainLoader
    method: Method
    wrapped: nn.Module  # the method, or DistributedDataParallel around it
    optimiser: torch.optim.AdamW
    average: Average[Detector] | None  # what is evaluated; the teacher itself as long as both are the same
    state: State
    progress: Progress
    stop: bool = False  # asked to by a signal

    def update_averages(self) -> None:
        """After a step: the teacher until it is frozen (Stop Update), the evaluated average always. One object until then."""
        teacher, stops = self.method.ema, any(t.stop_update for t in self.recipe.teachers if isinstance(t, EMATeacher))
        drop = first_drop(self.loader.steps_per_epoch, self.recipe.training)
        frozen = stops and drop is not None and self.state.step >= drop
        if teacher is not None and frozen and self.average is teacher:
            self.average = copy.deepcopy(teacher)
        if teacher is not None and not frozen:
            teacher.update(self.method.student)
        if self.average is not None and self.average is not teacher:
            self.average.update(self.method.student)

    @property
    def models(self) -> dict[str, Detector]:
        """What is evaluated: the trained weights and, where there is one, their average."""
        return {"model": self.method.student} | ({"ema": self.average.model} if self.average else {})

    @property
    def card(self) -> DetectorCard:
        index, recipe = self.val_data.index, self.recipe
        return DetectorCard(recipe.detector, index.classes, index.category_ids, recipe.data.resize, recipe.top, recipe.nms)


def prepare(recipe: Recipe, output: Path, resume: bool, device: str | None) -> Run:
    """Everything that can fail for the user's sake fails here, before the first step."""
    config = recipe.training
    accelerator = Accelerator(mixed_precision=config.precision, cpu=device == "cpu", step_scheduler_with_optimizer=False)
    progress = Progress(0, enabled=accelerator.is_main_process)
    train_data, val_data = open_both(recipe, progress)
    loader = TrainLoader(
        train_data, recipe.data, config.batch_size, config.accumulation, accelerator.process_index, accelerator.num_processes, config.seed
    )
    set_seed(config.seed)
    total_steps = loader.steps_per_epoch * config.epochs
    method = recipe.build(val_data.index.classes, total_steps)
    checkpoint = claim_folder(recipe, output, val_data.index, resume, accelerator)  # nothing is left behind where a teacher is refused
    if config.sync_batch_norm:
        if accelerator.device.type != "cuda":
            raise ValueError("training.sync_batch_norm works on GPUs only; on the CPU use frozen batch norm")
        method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
    method.to(accelerator.device)
    if config.compile:
        compile_layers(method.student)
    average = Average(method.student, config.ema_decay) if config.ema_decay else method.ema
    optimiser = make_optimiser(method, config)
    state = State()
    if checkpoint is not None:
        state, average = restore(checkpoint, method, average, optimiser)
        trim_metrics(output / "metrics.jsonl", state.step, accelerator)
    progress.total = total_steps
    progress.bar.update(progress.task, total=progress.total, completed=state.step)
    progress.say(describe(recipe, method, loader, val_data, state))
    for remark in remarks(recipe, total_steps):
        progress.say(remark)
    wrapped = accelerator.prepare_model(method)
    return Run(recipe, output, accelerator, val_data, loader, method, wrapped, optimiser, average, state, progress)


def remarks(recipe: Recipe, total_steps: int) -> list[str]:
    """What is allowed and probably not meant."""
    config, found = recipe.training, []
    if config.drops and config.drops[0] >= config.epochs:
        found.append(
            f"training.drop_epochs = {config.drop_epochs} is not within {config.epochs} epochs, so the learning rate never drops;"
            " values below 1 are shares of the run, whatever its length"
        )
    decays = {"training.ema_decay": config.ema_decay} | {
        f"teachers.{teacher.name}.decay": teacher.decay_for(total_steps) for teacher in recipe.teachers if isinstance(teacher, EMATeacher)
    }
    for option, decay in decays.items():
        horizon = 1 / (1 - decay)
        if decay and horizon > SLOW * total_steps:
            found.append(
                f"{option} = {decay} averages over the last {horizon:.0f} steps, but the run has {total_steps}, so that the average is far"
                f" behind; 2.8% of the run, as in OD-DETR, is {max(1 - 1 / (HORIZON * total_steps), 0):.4f} (None for a teacher)"
            )
    return found


def compile_layers(detector: nn.Module) -> None:
    """Encoder and decoder layer by layer: small graphs, which ragged query groups do not break."""
    for module in detector.modules():
        if isinstance(module, (EncoderLayer, DecoderLayer)):
            module.compile()


def open_both(recipe: Recipe, progress: Progress) -> tuple[Dataset, Dataset]:
    """Training and validation data, with the same classes and every image file in its place."""
    data = recipe.data
    train_data, dropped = for_training(open_data(data.source, data.train_split), data.filter_empty, data.limit)
    val_data = first_images(open_data(data.val_source or data.source, data.val_split), data.limit)
    if train_data.index.classes != val_data.index.classes:
        raise ValueError(
            f"training and validation data have different classes: {list(train_data.index.classes)} against {list(val_data.index.classes)}"
        )
    for part in (*parts_of(train_data), *parts_of(val_data)):
        if isinstance(part, FolderDataset) and (missing := part.missing_files()):
            raise ValueError(
                f"{part.name}: {len(missing)} images are not in {part.folder}, the first is {missing[0]}. `steadydetr check` lists all"
            )
    if dropped:
        progress.say(f"{train_data.name}: {dropped} boxes without area or outside their image are not trained on")
    return train_data, val_data


def claim_folder(recipe: Recipe, output: Path, index: AnnotationIndex, resume: bool, accelerator: Accelerator) -> Path | None:
    """Make the run folder, or, to resume, compare its config and give its checkpoint. Nothing in it is ever overwritten."""
    path = output / "config.json"
    plain = {
        "format": FORMAT,
        "recipe": to_plain(recipe, "recipe"),
        "classes": list(index.classes),
        "category_ids": list(index.category_ids),
    }
    if resume:
        checkpoint = find_checkpoint(output, prefer=("last", "best"))
        before = json.loads(path.read_text())
        check_format(before, str(path))
        before |= {"format": FORMAT, "recipe": renewed(before["recipe"], f"{path}: recipe")}
        if changed := differences(without_places(before), without_places(json.loads(json.dumps(plain)))):
            raise ValueError(f"{output} was started with another recipe; a resumed run keeps its own. Differences: {'; '.join(changed)}")
        return checkpoint
    accelerator.wait_for_everyone()
    if path.exists():
        raise FileExistsError(f"{output} already holds a run: go on with it by --resume, or choose another --output")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(path, plain)
    accelerator.wait_for_everyone()
    return None


def without_places(plain: dict[str, Any]) -> dict[str, Any]:
    """A run's config less where its teachers lie: they may have been moved, and `restore` knows them by their weights."""
    teachers = [{name: value for name, value in teacher.items() if name != "checkpoint"} for teacher in plain["recipe"]["teachers"]]
    return plain | {"recipe": plain["recipe"] | {"teachers": teachers}}


def read_run(folder: Path) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe and the classes of a run."""
    plain = json.loads((folder / "config.json").read_text())
    return from_plain(plain["recipe"], str(folder / "config.json")), tuple(plain["classes"])


def describe(recipe: Recipe, method: Method, loader: TrainLoader, val_data: Dataset, state: State) -> str:
    trainable = sum(p.numel() for p in method.parameters() if p.requires_grad)
    steps = loader.steps_per_epoch * recipe.training.epochs
    start = f", from step {state.step}" if state.step else ""
    return (
        f"{recipe.name}: {trainable / 1e6:.2f} M trainable parameters, {len(val_data.index.classes)} classes;"
        f" {len(loader.dataset.index)} training images ({loader.dataset.name}), {len(val_data.index)} to validate on;"
        f" {recipe.training.epochs} epochs, {steps} steps{start}"
    )


def save(run: Run, name: str, weights: str = "model") -> None:
    """The checkpoint `name`, with the trained weights or the average ("ema") as its model; beside `last` always the average, as `ema`."""
    if run.accelerator.is_main_process:
        student = run.average.model if weights == "ema" and run.average is not None else run.method.student
        extra = {
            "method": run.method.training_state(),
            "teachers": {name: teacher.fingerprint for name, teacher in run.method.teachers.items()},
            "average": None if run.average is None or run.average is run.method.ema else run.average.model.state_dict(),
            "optimiser": run.optimiser.state_dict(),
            "state": asdict(run.state),
        }
        save_detector(run.output / name, student.state_dict(), run.card, extra)
        if name == "last" and run.average is not None:
            save_detector(run.output / "ema", run.average.model.state_dict(), run.card)
    run.accelerator.wait_for_everyone()


def restore(
    checkpoint: Path, method: Method, average: Average[Detector] | None, optimiser: torch.optim.Optimizer
) -> tuple[State, Average[Detector] | None]:
    """The state, and the average, which has parted from the teacher where that was frozen.

    Raises:
        ValueError: a trained teacher is not the one that taught until then.
    """
    extra = load_training_state(checkpoint)
    for name, teacher in method.teachers.items():  # first: adapters of a teacher of another width would not fit either
        if teacher.fingerprint != extra.get("teachers", {}).get(name, ""):
            raise ValueError(
                f"{checkpoint} was taught by another {name}: the weights of the one that is given now differ. A run keeps its teacher,"
                " wherever that lies: name it by --teacher, or put its old weights back"
            )
    method.load_training_state(extra["method"])
    optimiser.load_state_dict(extra["optimiser"])
    if average is not None and extra["average"] is not None:
        average = copy.deepcopy(average)
        average.model.load_state_dict(extra["average"])
    return State(**extra["state"]), average


def trim_metrics(path: Path, step: int, accelerator: Accelerator) -> None:
    """Forget what was logged after the checkpoint: those steps are about to be repeated."""
    if accelerator.is_main_process and path.exists():
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        fresh = path.with_suffix(".new")
        fresh.write_text("".join(f"{line}\n" for line in kept))
        os.replace(fresh, path)
    accelerator.wait_for_everyone()


def write_record(run: Run, record: dict[str, Any]) -> None:
    with open(run.output / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def reduce(run: Run, values: dict[str, float], how: str) -> dict[str, float]:
    """Over the processes."""
    reduced = run.accelerator.reduce(torch.tensor(list(values.values()), device=run.accelerator.device), how)
    return dict(zip(values, reduced.tolist(), strict=True))


def log_step(run: Run, step: Step, rate: float, epoch: int, images_per_second: float) -> None:
    """Losses summed over the processes, which share one normaliser; measures averaged."""
    losses = reduce(run, step.losses, "sum")
    measures = reduce(run, step.measures, "mean")
    if not run.accelerator.is_main_process:
        return
    total = sum(losses.values())
    record = {
        "kind": "train",
        "step": run.state.step,
        "epoch": epoch,
        "loss": total,
        "losses": losses,
        "lr": rate,
        "gradient_norm": step.norm,
    }
    if measures:
        record["measures"] = measures
    record["memory_gib"] = peak_memory(run.accelerator.device) / 2**30
    write_record(run, record | {"images_per_second": images_per_second})
    ap = f"  AP {run.state.best_ap:.1f}" if run.state.best_ap >= 0 else ""
    run.progress.step(run.state.step, f"epoch {epoch + 1}  loss {total:.2f}  {images_per_second:.1f} images/s{ap}")


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU; on the CPU the most that the process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def log_evaluation(run: Run, weights: str, evaluation: Evaluation) -> None:
    if not run.accelerator.is_main_process:
        return
    write_record(run, {"kind": "eval", "step": run.state.step, "epoch": run.state.epochs_done, "weights": weights} | evaluation.as_dict())
    sizes = f"small {evaluation.ap_small:.1f}, medium {evaluation.ap_medium:.1f}, large {evaluation.ap_large:.1f}"
    run.progress.say(
        f"epoch {run.state.epochs_done} ({weights}): AP {evaluation.ap:.1f}, AP50 {evaluation.ap50:.1f},"
        f" AP75 {evaluation.ap75:.1f}, {sizes}"
    )
    for warning in evaluation.warnings:
        run.progress.say(f"  AP is low: {warning}")


def log_stability(run: Run, weights: str, measured: Stability) -> None:
    write_record(run, {"kind": "stability", "step": run.state.step, "epoch": run.state.epochs_done, "weights": weights} | asdict(measured))
    scores = ", ".join(f"{score:.0f}" for score in measured.unstable_score.values())
    since = "" if measured.between_epochs is None else f", instability since the last {measured.between_epochs:.2f}"
    shared = "" if measured.consistency is None else f", consistency with the average {measured.consistency[-1]:.0f}%"
    run.progress.say(f"  matching ({weights}): unstable score by layer {scores}%{since}{shared}")


def interrupted(run: Run) -> dict[str, Any]:
    summary = {"finished": False, "step": run.state.step, "output": str(run.output)}
    run.progress.say(f"Stopped and saved at step {run.state.step}. Go on with the same command and --resume.")
    return summary


def finish(run: Run) -> dict[str, Any]:
    """summary.json and the pictures."""
    state = run.state
    summary: dict[str, Any] = {
        "finished": True,
        "recipe": run.recipe.name,
        "step": state.step,
        "epochs": state.epochs_done,
        "images_seen": state.images_seen,
        "seconds": round(state.seconds, 1),
        "best_ap": state.best_ap,
        "output": str(run.output),
    }
    for weights, evaluation in state.evaluations.items():
        prefix = "" if weights == "model" else f"{weights}_"
        summary |= {f"{prefix}{name}": evaluation[name] for name in SUMMARY_NAMES if name in evaluation}
    if run.accelerator.is_main_process:
        write_json(run.output / "summary.json", summary)
        draw_curves(read_metrics(run.output / "metrics.jsonl"), run.output / "curves.png")
        draw_samples(run)
        draw_sampling_points(looking(run), run.recipe.criterion, run.val_data, run.recipe.data, run.output / "sampling.png")
    run.accelerator.wait_for_everyone()
    return summary


def looking(run: Run) -> dict[str, Detector]:
    return {{"model": "trained", "ema": "average"}[name]: model for name, model in run.models.items()}


def draw_samples(run: Run, count: int = 6) -> None:
    """Predictions beside ground truth for the first validation images that have objects."""
    detector = run.method.student.eval()
    data = first_images(run.val_data, 4 * count)
    predict = prediction_function(detector, run.accelerator.device, run.recipe.top, run.recipe.nms)
    loader = EvalLoader(data, run.recipe.data, run.recipe.training.eval_batch_size)
    found = [prediction for batch in loader for prediction in predict(batch)]
    shown = [i for i in range(len(data.index)) if data.index.counts[i]][:count]
    draw_predictions(data, shown, [found[i] for i in shown], run.output / "predictions.png")


@contextmanager
def stop_on_signal(run: Run) -> Iterator[None]:
    """SIGTERM and the first Ctrl-C let the step end, save and leave; a second Ctrl-C interrupts at once."""

    def ask(number: int, _: object) -> None:
        run.stop = True
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
