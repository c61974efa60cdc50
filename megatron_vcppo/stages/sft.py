"""Supervised fine-tuning: the cold start of the actor. Loss on responses only, packed, exactly resumable."""

import math
import time
from collections.abc import Callable
from pathlib import Path

from megatron_vcppo.config import Config, SftConfig
from megatron_vcppo.data.epoch_order import EpochOrder
from megatron_vcppo.data.mixture import Mixture, training_sources
from megatron_vcppo.data.packer import Packer
from megatron_vcppo.data.prompt_format import PromptFormat
from megatron_vcppo.data.sft_dataset import SftDataset, SftKeys, load_sft_dataset
from megatron_vcppo.data.tokenizer import load_tokenizer
from megatron_vcppo.data.vocabulary import stop_ids
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.learner import Actor, StepResult
from megatron_vcppo.mcore.model import ActorModel, build_actor
from megatron_vcppo.mcore.starting_weights import load_from_hf
from megatron_vcppo.records import TrainSequence
from megatron_vcppo.run.events import startup
from megatron_vcppo.run.folder import StageFolder
from megatron_vcppo.run.log import say
from megatron_vcppo.run.progress import Progress
from megatron_vcppo.stages.loop import TrainLoop
from megatron_vcppo.stages.speed import work
from megatron_vcppo.stages.stage import start_stage
from megatron_vcppo.stages.training_losses import TokenLoss

FIELDS: dict[str, type] = {"loss_mask": bool}


def run(config: Config) -> None:
    """Fine-tune model.hf on sft.train; leaves RUN/sft/checkpoints. Raises Saved if asked to stop."""
    stage, settings = start_stage(config, "sft"), config.sft
    model = base_actor(config)
    train, validation = load_datasets(config, stage.folder)
    mixture = mixture_of(config, train)
    order = EpochOrder(mixture.num_samples, config.run.seed, settings.train)
    total_steps = num_steps(settings, order.num_samples, stage.runtime.is_main)
    actor = Actor(model, config.parallel, settings.optimizer, settings.schedule, total_steps)
    startup.done("model")
    loop = TrainLoop(stage, {"actor": actor}, total_steps, settings.checkpoint)
    loop.track(order=order)
    with loop:
        for step in loop:
            batch = [train[mixture.at(*place)[0]] for place in order.next(settings.batch_size)]
            result = train_step(actor, batch, stage.packer)
            num_tokens = sum(map(len, batch))
            metrics = step_metrics(result, order.samples_seen / order.num_samples, num_tokens, loop.step_seconds)
            metrics |= work(stage, map(len, batch))
            if validation and is_validated(step, settings, total_steps):
                metrics |= validate(actor, validation, stage.packer)
            shown = {"loss": result.metrics["loss"], "lr": result.learning_rate}
            loop.log(metrics, count=num_tokens, shown=shown, skipped={"actor": [not result.applied]})
    runtime.stop()


def mixture_of(config: Config, train: SftDataset) -> Mixture:
    """How often the examples of sft.train and sft.mix come."""
    weights = training_sources(config.sft.train, config.sft.mix).values()
    return Mixture(list(zip(train.sizes, weights, strict=True)), config.run.seed)


def base_actor(config: Config) -> ActorModel:
    """model.hf, ready for training. Raises UserError if it cannot read sequences of model.max_length."""
    arch = Architecture.from_hf(config.model.hf)
    arch.check_length(config.model.max_length)
    model = build_actor(arch, config.model, config.parallel)
    load_from_hf(model, Path(config.model.base))
    startup.done("model")
    return model


def num_steps(settings: SftConfig, num_samples: int, is_main: bool) -> int:
    """Optimizer steps in all; the last batch is filled from the epoch after. A warm-up that is longer is
    reported on the main rank."""
    total = settings.steps or math.ceil(settings.epochs * num_samples / settings.batch_size)
    warmup = settings.schedule.warmup_steps
    if warmup > total and is_main:
        say(f"note: {total} steps end within sft.schedule.warmup_steps {warmup}")
    return total


def train_step(actor: Actor, batch: list[TrainSequence], packer: Packer) -> StepResult:
    """One optimizer step on the mean loss per response token of a batch, which every rank has."""
    mine = [batch[i] for i in packer.shard([len(sequence) for sequence in batch])]
    num_loss_tokens = sum(sum(sequence.fields["loss_mask"]) for sequence in batch)
    return actor.train_step(packer.pack(mine, FIELDS), TokenLoss(num_loss_tokens))


def step_metrics(result: StepResult, epoch: float, num_tokens: int, seconds: float) -> dict[str, float]:
    """The metrics of a step, as they are logged."""
    return {
        "sft/loss": result.metrics["loss"],
        "sft/entropy": result.metrics["entropy"],
        **{f"sft/{name}": value for name, value in result.metrics.items() if name.startswith("router_")},
        "sft/grad_norm": result.grad_norm,
        "sft/learning_rate": result.learning_rate,
        "sft/epoch": epoch,
        "sft/tokens_per_s": num_tokens / seconds,
        "time/step_s": seconds,
    }


def is_validated(step: int, settings: SftConfig, total_steps: int) -> bool:
    """The last step always is."""
    return step == total_steps or (settings.validate_every > 0 and step % settings.validate_every == 0)


def validate(actor: Actor, dataset: SftDataset, packer: Packer) -> dict[str, float]:
    """Metrics ``sft/validation_…`` over the whole validation set, the same on every rank, and how long that took."""
    started = time.monotonic()
    mine = [dataset[index] for index in packer.shard(dataset.lengths.tolist())]
    found = actor.evaluate(packer.pack(mine, FIELDS), TokenLoss(dataset.num_loss_tokens))
    metrics = {f"sft/validation_{name}": value for name, value in found.items()}
    return metrics | {"time/validation_s": time.monotonic() - started}


def load_datasets(config: Config, folder: StageFolder) -> tuple[SftDataset, SftDataset | None]:
    """Training and validation examples; collective."""
    settings = config.sft
    train = shared_dataset(config, folder, list(training_sources(settings.train, settings.mix)), "train")
    held_out = settings.validation
    validation = shared_dataset(config, folder, [held_out], "validation") if held_out else None
    startup.done("data")
    return train, validation


def shared_dataset(config: Config, folder: StageFolder, sources: list[str], name: str) -> SftDataset:
    """Tokenize once, on the main rank, into RUN/sft/data; every rank maps the arrays. Collective."""
    path = folder.data(name)

    def tokenize(beat: Callable[[], None]) -> None:
        keys = SftKeys.of(config.sft)
        tokenizer = load_tokenizer(config.model.hf)
        loaded = []
        for source in sources:
            dataset, report = load_sft_dataset(
                source,
                tokenizer,
                config.model.max_length,
                config.sft.bad_samples,
                keys,
                on_progress=progress_of_tokenizing(name, beat),
                how=PromptFormat.of(config.prompts),
                stops=stop_ids(Path(config.model.hf)),
            )
            say(str(report))
            loaded.append(dataset)
        SftDataset.joined(loaded).save(path)

    runtime.on_main(tokenize, f"tokenizing {', '.join(sources)}")
    return SftDataset.load(path)


def progress_of_tokenizing(name: str, beat: Callable[[], None]) -> Callable[[int, float], None]:
    """Prints the progress of one source and calls ``beat``."""
    progress, seen = Progress(f"tokenize {name}", 100, unit="samples"), 0

    def on_progress(num_samples: int, fraction: float) -> None:
        nonlocal seen
        progress.update(int(100 * fraction), num_samples - seen)
        seen = num_samples
        beat()

    return on_progress
