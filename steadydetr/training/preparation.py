"""From a recipe to a run that can take its first step. Whatever can fail because of data, recipe or folder fails here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.layers import convert_sync_batchnorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from steadydetr.config import check_savable, to_plain
from steadydetr.data import Dataset, EvalLoader, TrainLoader, first_images, for_training, open_data
from steadydetr.data.dataset import FolderDataset, parts_of, without_images
from steadydetr.data.loading import DataConfig, find_unreadable
from steadydetr.data.trainable import NORMALISED, how_classes_differ, look_normalised, smaller_than_a_pixel, why_no_object
from steadydetr.finite import where_not_finite
from steadydetr.learning.teachers import relative_decay
from steadydetr.metrics.low_ap import explain_limit
from steadydetr.objectives.method import Method
from steadydetr.recipes.base import Recipe
from steadydetr.runs.folder import RunConfig, RunFolder
from steadydetr.runs.lock import FolderLock
from steadydetr.runs.sinks import JSONLines, RunLog, open_sinks
from steadydetr.training.averages import Averages, make_averages
from steadydetr.training.optimiser import make_optimiser
from steadydetr.training.processes import MainWork, main_decides, make_accelerator, read_everywhere, together
from steadydetr.training.progress import ConsoleWriter, Progress
from steadydetr.training.run import Run, State, read_saved, restore

GRAPHS = 64  # that torch may compile of one function; its own limit of 8 is for one model
LONG_HORIZON = 0.1  # share of the run's steps; an average over more steps lags far behind the trained weights


def prepare(recipe: Recipe, output: Path, resume: bool | Literal["auto"], device: str | None) -> Run:
    """Everything that training needs. A new run's folder is claimed last, so that an error before leaves no folder behind.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: data, recipe, teacher or folder cannot work; says why.
    """
    check_savable(recipe, "recipe")
    with ExitStack() as on_failure:
        run = _prepare(recipe, RunFolder(output), on_failure.enter_context(FolderLock(output)), resume, device)
        on_failure.pop_all()
    return run


def _prepare(recipe: Recipe, folder: RunFolder, lock: FolderLock, resume: bool | Literal["auto"], device: str | None) -> Run:
    config = recipe.training
    accelerator = make_accelerator(config.precision, device)
    goes_on = main_decides(accelerator, lambda: folder.goes_on(resume))
    if goes_on:
        main_decides(accelerator, lambda: folder.reopen(lock))
    progress = Progress(enabled=accelerator.is_main_process)
    progress.say(f"Loading {recipe.data.source} and building {recipe.name} on {accelerator.device}")
    loader, val_loader = open_loaders(recipe, accelerator, progress.say)
    val_data = val_loader.dataset
    total_steps = loader.steps_per_epoch * config.epochs
    set_seed(config.seed)
    method = together(accelerator, lambda: build_method(recipe, val_data.index.classes, total_steps, accelerator))
    averages = make_averages(recipe, method, loader.steps_per_epoch)
    optimiser = make_optimiser(method, config)
    run_config = make_run_config(recipe, loader.dataset, val_data)
    checkpoint = main_decides(accelerator, lambda: folder.resume(run_config)) if goes_on else None
    state = State() if checkpoint is None else resume_state(checkpoint, folder, accelerator, method, averages, optimiser)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(method, method.unused_parameters)  # it would wait for them
    wrapped = accelerator.prepare_model(method)
    progress.begin(total_steps, state.step)
    log = open_log(recipe, folder, lock, run_config, state, goes_on, accelerator, progress)
    if goes_on and checkpoint is None:
        log.say(f"{folder.path} was stopped before its first checkpoint, so it starts anew")
    run = Run(
        recipe=recipe,
        folder=folder,
        lock=lock,
        accelerator=accelerator,
        main_work=MainWork(accelerator),
        val_data=val_data,
        loader=loader,
        val_loader=val_loader,
        method=method,
        wrapped=wrapped,
        optimiser=optimiser,
        averages=averages,
        state=state,
        log=log,
        progress=progress,
    )
    for sentence in (describe(run), *remarks(recipe, total_steps)):
        log.say(sentence)
    return run


def open_loaders(recipe: Recipe, accelerator: Accelerator, say: Callable[[str], None]) -> tuple[TrainLoader, EvalLoader]:
    """The loaders of this process's shares of the training and of the validation data."""
    config, processes = recipe.training, (accelerator.process_index, accelerator.num_processes)
    unreadable = main_decides(accelerator, lambda: unreadable_of_both(recipe, say))
    train_data, val_data = together(accelerator, lambda: open_both(recipe, say, unreadable))
    loader = together(
        accelerator, lambda: TrainLoader(train_data, recipe.data, config.batch_size, config.accumulation, *processes, config.seed)
    )
    return loader, EvalLoader(val_data, recipe.data, config.eval_batch_size, *processes)


def make_run_config(recipe: Recipe, train_data: Dataset, val_data: Dataset) -> RunConfig:
    """What config.json of the run will hold."""
    data = {"train": train_data.index.identity, "val": val_data.index.identity}
    return RunConfig(to_plain(recipe, "recipe"), val_data.index.classes, val_data.index.category_ids, data)


def open_splits(data: DataConfig) -> tuple[Dataset, Dataset]:
    """The splits to train on and to validate on, as they are on disk."""
    return open_data(data.source, data.train_split, data), open_data(data.val_source or data.source, data.val_split, data)


def unreadable_of_both(recipe: Recipe, say: Callable[[str], None]) -> tuple[set[int], set[int]]:
    """Positions of images of both splits that cannot be read, if these are to be left out. Each is named."""
    found = [set[int](), set[int]()]
    if recipe.data.unreadable == "skip":
        for dataset, positions in zip(open_splits(recipe.data), found, strict=True):
            reasons = find_unreadable(dataset, recipe.data)
            positions.update(reasons)
            if reasons:
                say(f"{dataset.name}: {len(reasons)} of {len(dataset.index)} images are left out, which cannot be read:")
                for reason in reasons.values():
                    say(f"  {reason.removesuffix('. `steadydetr check` lists all such files')}")
            if len(reasons) == len(dataset.index):
                raise ValueError(f"{dataset.name}: none of its {len(reasons)} images can be read: {next(iter(reasons.values()))}")
    return found[0], found[1]


def open_both(
    recipe: Recipe, say: Callable[[str], None], unreadable: tuple[Collection[int], Collection[int]] = ((), ())
) -> tuple[Dataset, Dataset]:
    """Training and validation data.

    Args:
        unreadable: positions of images of both that are left out.

    Raises:
        ValueError: their classes differ, an image file is missing, or no object is left to train on.
    """
    data = recipe.data
    both = [without_images(split, positions) for split, positions in zip(open_splits(data), unreadable, strict=True)]
    if reason := why_no_object(both[0].index):
        raise ValueError(f"{both[0].name} has no object to train on: {reason}")
    train_data, dropped = for_training(both[0], data.filter_empty, data.limit)
    val_data = first_images(both[1], data.limit)
    if not len(val_data.index):
        raise ValueError(f"{val_data.name} has no image to validate on: choose another --data.val-split or --data.val-source")
    if differ := how_classes_differ(train_data.index.classes, val_data.index.classes):
        raise ValueError(f"training and validation data have different classes: {differ}")
    if data.unreadable == "error":
        for part in (*parts_of(train_data), *parts_of(val_data)):
            if isinstance(part, FolderDataset):
                part.check_files()
    for part in (*parts_of(train_data), *parts_of(val_data)):
        for sentence in part.remarks if isinstance(part, FolderDataset) else ():
            say(f"{part.name}: {sentence}")
    if dropped:
        say(f"{train_data.name}: {dropped} boxes without area or outside their image are not trained on")
    for sentence in object_remarks(recipe, train_data, val_data):
        say(sentence)
    return train_data, val_data


def object_remarks(recipe: Recipe, train_data: Dataset, val_data: Dataset) -> list[str]:
    """What of the objects cannot be learned or counted. No image is opened.

    Raises:
        ValueError: no object is left to train on.
    """
    index, found = train_data.index, []
    total, scale = len(index.labels), recipe.data.transform.largest_scale(index.sizes)
    small = 0 if scale is None else int(smaller_than_a_pixel(index, scale).sum())
    normalised = f"{train_data.name}: {NORMALISED}" if look_normalised(index) else ""
    if small == total:
        reason = f"all {total} are smaller than a pixel at the size of training" if total else "the images that are taken have none"
        raise ValueError(f"{train_data.name} has no object to train on: {normalised or reason}")
    if normalised:
        found.append(normalised)
    if small:
        found.append(
            f"{train_data.name}: {small} of {total} objects are smaller than a pixel at the size of training, and are not trained on"
        )
    queries = getattr(recipe.detector, "queries", None)  # what detectors of this package call it; that of a plugin may have no such field
    most = int(max(data.index.counts.max() for data in (train_data, val_data)))
    if isinstance(queries, int) and most > queries:
        found.append(
            f"images hold up to {most} objects, the detector has {queries} queries, and each finds at most one object:"
            " raise --detector.queries"
        )
    if not (~val_data.index.crowd).any():
        found.append(f"{val_data.name} has no object to find, so that AP is undefined (-1)")
    return [*found, *explain_limit(val_data.index)]


def build_method(recipe: Recipe, classes: Sequence[str], total_steps: int, accelerator: Accelerator) -> Method:
    """The method of a recipe, on the device of this process."""
    method = recipe.build(classes, total_steps)
    if found := where_not_finite(method.state_dict()):
        raise ValueError(f"the weights to start with are not finite: {found}. A file that they are read from is damaged")
    if recipe.training.sync_batch_norm:
        if accelerator.device.type != "cuda":
            raise ValueError("training.sync_batch_norm works on GPUs only; on the CPU use frozen batch norm")
        method = convert_sync_batchnorm(method)  # torch's own would leave out the activations that timm's batch norms hold
    method.to(accelerator.device)
    if recipe.training.compile:
        compile_layers(method)
    return method


def compile_layers(method: Method) -> None:
    """Let torch compile the student and its teachers, each part by itself.

    Parts of one kind share a cache of graphs, whichever detector they are of. Trained, teaching and evaluated they need some ten together;
    of a full cache torch would leave the rest uncompiled.
    """
    from torch._dynamo import config

    config.cache_size_limit = max(config.cache_size_limit, GRAPHS)
    for detector in (method.student, *method.teaching.values()):
        for part in detector.compiled_parts():
            part.compile()


def resume_state(
    checkpoint: Path, folder: RunFolder, accelerator: Accelerator, method: Method, averages: Averages, optimiser: Optimizer
) -> State:
    """Load a checkpoint of the run into method, averages and optimiser, in all processes; gives the state that it was saved with."""
    best = main_decides(accelerator, folder.best_progress)
    saved = read_everywhere(accelerator, checkpoint, lambda: read_saved(checkpoint, best))
    return together(accelerator, lambda: restore(saved, method, averages, optimiser))


def open_log(
    recipe: Recipe,
    folder: RunFolder,
    lock: FolderLock,
    config: RunConfig,
    state: State,
    goes_on: bool,
    accelerator: Accelerator,
    progress: Progress,
) -> RunLog:
    """In the main process, start the run's folder or trim its records, and open the sinks. Other processes get a log without sinks."""
    log = RunLog()

    def open_all() -> None:
        if goes_on:
            folder.trim_records(state.step, state.epochs_done)
        else:
            folder.claim(lock)
        log.further = open_sinks(recipe.sinks, folder.path, config.plain_recipe, state.step)
        log.always = (ConsoleWriter(progress, state.best_ap), JSONLines(folder))
        folder.write_config(config)  # last, because a folder without it counts as free

    main_decides(accelerator, open_all)
    return log


def describe(run: Run) -> str:
    """What is about to be trained, in one sentence."""
    epochs, data = run.recipe.training.epochs, run.loader.dataset
    trainable = sum(p.numel() for p in run.method.parameters() if p.requires_grad)
    start = f", from step {run.state.step}" if run.state.step else ""
    return (
        f"{run.recipe.name}: {trainable / 1e6:.2f} M trainable parameters, {len(run.val_data.index.classes)} classes;"
        f" {len(data.index)} training images ({data.name}), {len(run.val_data.index)} to validate on;"
        f" {epochs} epochs, {run.loader.steps_per_epoch * epochs} steps{start}"
    )


def remarks(recipe: Recipe, total_steps: int) -> list[str]:
    """Warnings of settings that are allowed but probably not meant: a rate that never drops, an average that lags far behind."""
    config, found = recipe.training, []
    if config.drops and config.drops[0] >= config.epochs:
        found.append(
            f"training.drop_epochs = {config.drop_epochs} is not within {config.epochs} epochs, so the learning rate never drops;"
            " values below 1 are shares of the run, whatever its length"
        )
    decays = {"training.ema_decay": config.ema_decay} | {
        f"teachers.{teacher.name}.decay": decay for teacher in recipe.teachers if (decay := teacher.decay_for(total_steps)) is not None
    }
    for option, decay in decays.items():
        horizon = 1 / (1 - decay)
        if decay and horizon > LONG_HORIZON * total_steps:
            found.append(
                f"{option} = {decay} averages over the last {horizon:.0f} steps, but the run has {total_steps}, so that the average is far"
                f" behind; 2.8% of the run, as in OD-DETR, is {relative_decay(total_steps):.4f} (None for a teacher)"
            )
    return found
