"""From a recipe to a run that can take its first step. Whatever can fail because of data, recipe or folder fails here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from steadydetr.checkpoints.class_names import joined_classes
from steadydetr.checkpoints.transfer import Transfer
from steadydetr.checkpoints.weights import TrainedWeights, read_weights
from steadydetr.config import check_savable, to_plain
from steadydetr.data import Dataset, EvalLoader, TrainLoader, first_images, for_training
from steadydetr.data.dataset import FolderDataset, in_channels, parts_of, with_classes, without_images
from steadydetr.data.division import Division, classes_only_in
from steadydetr.data.loading import find_unreadable
from steadydetr.data.opening import BOXES_ALONE, Splits, open_train_and_val, telling
from steadydetr.data.trainable import (
    ALLOW_SAME,
    CORNERS,
    ELSEWHERE,
    NORMALISED,
    check_transform,
    how_classes_differ,
    how_images_are_shared,
    how_versions_are_shared,
    look_elsewhere,
    look_like_corners,
    look_normalised,
    memory_of_masks,
    say_elsewhere,
    smaller_than_a_pixel,
    why_no_object,
)
from steadydetr.detectors import Detector
from steadydetr.files import counted, listed, printable
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
from steadydetr.training.precision import precision_remarks
from steadydetr.training.processes import MainWork, main_decides, make_accelerator, read_everywhere, together
from steadydetr.training.progress import ConsoleWriter, Progress
from steadydetr.training.run import Run, State, read_saved, restore
from steadydetr.training.settling import settle, settle_schedule

Classes = tuple[Sequence[str], Sequence[int]]  # names and category ids
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
    accelerator = make_accelerator(device)
    goes_on = main_decides(accelerator, lambda: reopen_if_it_goes_on(folder, lock, resume))
    before = main_decides(accelerator, folder.read_config).recipe() if goes_on else None  # of the run that goes on
    progress = Progress(enabled=accelerator.is_main_process)
    progress.say(f"Loading {recipe.data.source} and building {recipe.name} on {accelerator.device}")
    weights = None if goes_on and folder.latest_checkpoint else read_start(recipe, accelerator)
    check_masks_are_read(recipe)
    recipe = settle(recipe, accelerator.device, before, None if weights is None else weights.card.detector)
    divisions = folder.read_splits() if goes_on else None
    more_classes = classes_to_keep(recipe, folder, weights)
    train_data, val_data, divisions = open_for_run(recipe, accelerator, progress.say, more_classes, divisions)
    recipe = settle_schedule(recipe, train_data, accelerator, progress.say)
    loader, val_loader = make_loaders(recipe, train_data, val_data, accelerator)
    total_steps = loader.steps_per_epoch * recipe.training.epochs
    set_seed(recipe.training.seed)
    student, transfer = together(accelerator, lambda: build_student(recipe, val_data.index.classes, weights))
    method = together(accelerator, lambda: build_method(recipe, val_data.index.classes, total_steps, accelerator, student))
    averages = make_averages(recipe, method, loader.steps_per_epoch)
    optimiser = make_optimiser(method, recipe.training)
    run_config = make_run_config(recipe, loader.dataset, val_data)
    checkpoint = main_decides(accelerator, lambda: folder.resume(run_config)) if goes_on else None
    state = State() if checkpoint is None else resume_state(checkpoint, folder, accelerator, method, averages, optimiser)
    wrapped = wrap(method, accelerator)
    progress.begin(total_steps, state.step)
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
        log=open_log(recipe, folder, lock, run_config, state, goes_on, accelerator, progress),
        progress=progress,
    )
    if divisions and accelerator.is_main_process:
        folder.write_splits(divisions)
    introduce(run, goes_on and checkpoint is None, weights, transfer)
    return run


def check_masks_are_read(recipe: Recipe) -> None:
    """Raise ValueError where the recipe learns masks and the data are read without them."""
    if recipe.criterion.masks is not None and not recipe.data.masks:
        raise ValueError(
            f"{recipe.name} learns masks, which data.masks = False leaves unread: --data.masks, or --criterion.masks none"
            " --detector.box-init no to train without them"
        )


def reopen_if_it_goes_on(folder: RunFolder, lock: FolderLock, resume: bool | Literal["auto"]) -> bool:
    """Whether the folder's run goes on, whose lock is then taken."""
    goes_on = folder.goes_on(resume)
    if goes_on:
        folder.reopen(lock)
    return goes_on


def read_start(recipe: Recipe, accelerator: Accelerator) -> TrainedWeights | None:
    """The weights that a new run starts from, in all processes; None if there are none."""
    where = recipe.start.weights
    return read_everywhere(accelerator, Path(where), lambda: read_weights(where)) if where else None


def classes_to_keep(recipe: Recipe, folder: RunFolder, weights: TrainedWeights | None) -> Classes:
    """The names and category ids that the classes of the data are joined with; none where these are all."""
    if not recipe.start.keep_classes:
        return (), ()
    source = folder.read_config() if weights is None else weights.card  # a run that goes on has its classes already
    return source.classes, source.category_ids


def open_for_run(
    recipe: Recipe,
    accelerator: Accelerator,
    say: Callable[[str], None],
    more_classes: Classes = ((), ()),
    divisions: Sequence[Division] | None = None,
) -> tuple[Dataset, Dataset, list[Division]]:
    """Training and validation data, with the classes that are kept besides theirs, and how places were divided into the two.

    Args:
        divisions: those of a run that goes on.
    """
    unreadable = main_decides(accelerator, lambda: unreadable_of_both(recipe, say, divisions))
    train_data, val_data, made = together(accelerator, lambda: open_both(recipe, say, unreadable, divisions))
    if more_classes[0]:
        index = train_data.index
        classes = joined_classes(index.classes, index.category_ids, *more_classes, recipe.start.classes)
        train_data, val_data = with_classes(train_data, *classes), with_classes(val_data, *classes)
    channels = recipe.detector.image_channels
    if channels != 3:
        both = (train_data, val_data)
        train_data, val_data = together(accelerator, lambda: (in_channels(both[0], channels), in_channels(both[1], channels)))
        check_transform(recipe.data.transform, channels)
    return train_data, val_data, made


def make_loaders(recipe: Recipe, train_data: Dataset, val_data: Dataset, accelerator: Accelerator) -> tuple[TrainLoader, EvalLoader]:
    """The loaders of this process's shares of the training and of the validation data."""
    config, processes = recipe.training, (accelerator.process_index, accelerator.num_processes)
    batch, steps, pin = config.images_per_step, config.epoch_steps, accelerator.device.type == "cuda"
    loader = together(
        accelerator, lambda: TrainLoader(train_data, recipe.data, batch, config.micro_batches, *processes, config.seed, steps, pin)
    )
    return loader, EvalLoader(val_data, recipe.data, config.eval_batch_size, *processes, pin)


def make_run_config(recipe: Recipe, train_data: Dataset, val_data: Dataset) -> RunConfig:
    """What config.json of the run will hold."""
    data = {"train": train_data.index.identity, "val": val_data.index.identity}
    return RunConfig(to_plain(recipe, "recipe"), val_data.index.classes, val_data.index.category_ids, data)


def unreadable_of_both(
    recipe: Recipe, say: Callable[[str], None], divisions: Sequence[Division] | None = None
) -> tuple[set[int], set[int]]:
    """Positions of images of both splits that cannot be read, if these are to be left out. Each is named."""
    found = [set[int](), set[int]()]
    if recipe.data.unreadable == "skip":
        both = open_train_and_val(recipe.data, divisions=divisions)
        for dataset, positions in zip((both.train, both.val), found, strict=True):
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
    recipe: Recipe,
    say: Callable[[str], None],
    unreadable: tuple[Collection[int], Collection[int]] = ((), ()),
    divisions: Sequence[Division] | None = None,
) -> Splits:
    """Training and validation data, and how places were divided into the two.

    Args:
        unreadable: positions of images of both that are left out.
        divisions: those of a run that goes on.

    Raises:
        ValueError: their classes differ, they are the same images, an image file is missing, or no object is left to train on.
    """
    data = recipe.data
    opened = open_train_and_val(data, telling(say), say, divisions)
    shared = how_images_are_shared(opened.train, opened.val)
    if shared.all and data.same_images == "refuse":
        raise ValueError(f"{shared.sentence}. {ALLOW_SAME}")
    both = [without_images(split, positions) for split, positions in zip((opened.train, opened.val), unreadable, strict=True)]
    if reason := why_no_object(both[0].index):
        boxes = f". {BOXES_ALONE}" if (both[0].index.without_mask & ~both[0].index.crowd).any() else ""
        raise ValueError(f"{both[0].name} has no object to train on: {reason}{boxes}")
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
    for sentence in filter(None, (shared.sentence, how_versions_are_shared(opened.train, opened.val))):
        say(sentence)
    if dropped:
        say(f"{train_data.name}: {dropped} boxes without area or outside their image are not trained on")
    if maskless := int((both[0].index.without_mask & ~both[0].index.crowd).sum()):
        say(
            f"{train_data.name}: {counted(maskless, 'annotation')} without a mask are not trained on; `steadydetr check --masks` names them"
        )
    for sentence in object_remarks(recipe, train_data, val_data, bool(opened.divisions)):
        say(sentence)
    return Splits(train_data, val_data, opened.divisions)


def object_remarks(recipe: Recipe, train_data: Dataset, val_data: Dataset, divided: bool = False) -> list[str]:
    """What of the objects cannot be learned or counted. No image is opened.

    Args:
        divided: it was said already of which classes nothing is left to train on.

    Raises:
        ValueError: no object is left to train on.
    """
    index, found = train_data.index, []
    total, scale = len(index.labels), recipe.data.transform.largest_scale(index.sizes)
    small = 0 if scale is None else int(smaller_than_a_pixel(index, scale).sum())
    if look_normalised(index):
        raise ValueError(f"{train_data.name} has no object to train on: {NORMALISED}")
    if small == total:
        reason = f"all {total} are smaller than a pixel at the size of training" if total else "the images that are taken have none"
        raise ValueError(f"{train_data.name} has no object to train on: {reason}")
    if look_elsewhere(index):
        raise ValueError(f"{train_data.name} has no object to train on: {ELSEWHERE}")
    if look_normalised(val_data.index):
        found.append(f"{val_data.name}: {NORMALISED}")
    found += [f"{data.name}: {said}" for data in (train_data, val_data) if (said := say_elsewhere(data.index))]
    found += [f"{data.name}: {CORNERS}" for data in (train_data, val_data) if look_like_corners(data.index)]
    if small:
        found.append(
            f"{train_data.name}: {small} of {total} objects are smaller than a pixel at the size of training, and are not trained on"
        )
    if not divided and (never := classes_only_in(val_data.index, train_data.index)):
        found.append(f"{val_data.name} has objects of classes that no image to train on shows: {printable(listed(never, 10))}")
    if sentence := memory_of_masks(index):
        found.append(f"{train_data.name}: {sentence}")
    queries = recipe.detector.queries
    most = int(max(data.index.counts.max() for data in (train_data, val_data)))
    if queries is not None and most > queries:
        found.append(
            f"images hold up to {most} objects, the detector has {queries} queries, and each finds at most one object:"
            " raise --detector.queries"
        )
    if not (~val_data.index.crowd).any():
        found.append(f"{val_data.name} has no object to find, so that AP is undefined (-1)")
    return [*found, *explain_limit(val_data.index)]


def build_student(recipe: Recipe, classes: Sequence[str], weights: TrainedWeights | None) -> tuple[Detector, Transfer | None]:
    """The detector with its first weights, and what became of the ones to start from, if there are any."""
    student = recipe.build_student(len(classes))
    return student, None if weights is None else recipe.start.load(student, recipe.detector, classes, weights)


def build_method(recipe: Recipe, classes: Sequence[str], total_steps: int, accelerator: Accelerator, student: Detector) -> Method:
    """The method of a recipe that trains this detector, on the device of this process."""
    method = recipe.build(classes, total_steps, student)
    for name, teacher in method.teaching.items():
        if teacher.image_channels != student.image_channels:
            raise ValueError(
                f"the {name} takes images of {counted(teacher.image_channels, 'channel')}, the detector of {student.image_channels}:"
                " both must be the same (detector.backbone.image_channels)"
            )
    if recipe.training.freeze:
        method.student.freeze(recipe.training.freeze)
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


def wrap(method: Method, accelerator: Accelerator) -> nn.Module:
    """The method, or what sums its gradients over the processes."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(method, method.unused_parameters)  # it would wait for them
    wrapped: nn.Module = accelerator.prepare_model(method)
    return wrapped


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


def introduce(run: Run, anew: bool, weights: TrainedWeights | None, transfer: Transfer | None) -> None:
    """Say what is about to be trained and from what it starts, which the main process also saves, and what is probably not meant.

    Args:
        anew: the run was stopped before its first checkpoint.
    """
    if anew:
        run.log.say(f"{run.folder.path} was stopped before its first checkpoint, so it starts anew")
    run.log.say(describe(run))
    if weights is not None and transfer is not None:
        run.log.say(f"It starts from {weights.where}:")
        for sentence in transfer.sentences():
            run.log.say(f"  {sentence}")
        if run.accelerator.is_main_process:
            run.folder.write_start({"weights": weights.where} | transfer.as_plain())
    precision = precision_remarks(run.recipe.training, run.accelerator.device)
    for sentence in [*precision, *remarks(run.recipe, run.loader.steps_per_epoch * run.recipe.training.epochs)]:
        run.log.say(sentence)


def describe(run: Run) -> str:
    """What is about to be trained, in one sentence."""
    epochs, data = run.recipe.training.epochs, run.loader.dataset
    trainable = sum(p.numel() for p in run.method.parameters() if p.requires_grad)
    start = f", from step {run.state.step}" if run.state.step else ""
    return (
        f"{run.recipe.name}: {trainable / 1e6:.2f} M trainable parameters, {len(run.val_data.index.classes)} classes;"
        f" {len(data.index)} training images ({data.name}), {len(run.val_data.index)} to validate on;"
        f" {counted(epochs, 'epoch')}, {counted(run.loader.steps_per_epoch * epochs, 'step')}{start}"
    )


def remarks(recipe: Recipe, total_steps: int) -> list[str]:
    """Warnings of settings that are allowed but probably not meant: a rate that never drops, an average that lags far behind."""
    config, found = recipe.training, []
    if config.drops and config.drops[0] >= config.epochs:
        found.append(
            f"training.drop_epochs = {config.drop_epochs} is not within {config.epochs} epochs, so the learning rate never drops;"
            " values below 1 are shares of the run, whatever its length"
        )
    decays = {"training.ema_decay": config.ema_decay or 0.0} | {
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
