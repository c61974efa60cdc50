"""Supervised fine-tuning: the cold start of the actor. Loss on responses only, packed, exactly resumable."""

import math
import time
from collections.abc import Callable
from pathlib import Path

from megatron_vcppo.config import Config, SftConfig
from megatron_vcppo.data.epoch_order import EpochOrder
from megatron_vcppo.data.rollout_batch import Packer
from megatron_vcppo.data.sft_dataset import SftDataset, SftKeys, load_sft_dataset
from megatron_vcppo.data.tokenizer import load_tokenizer
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.checkpoint import CheckpointFolder
from megatron_vcppo.mcore.hf_weights_io import load_hf
from megatron_vcppo.mcore.learner import Actor
from megatron_vcppo.mcore.model import build_actor
from megatron_vcppo.run.metrics_log import MetricsLog
from megatron_vcppo.run.progress import Progress
from megatron_vcppo.run.startup import startup
from megatron_vcppo.stages.nonfinite import NonfiniteUpdates
from megatron_vcppo.stages.stage import mark_done, packer_of, stage_folder
from megatron_vcppo.stages.stopping import Saved, stopping
from megatron_vcppo.stages.training_losses import TokenLoss


def run(config: Config) -> None:
    """Fine-tune model.hf on sft.train; leaves RUN/sft/checkpoints. Raises Saved if asked to stop."""
    settings, folder = config.sft, stage_folder(config, "sft")
    world = runtime.start(config.parallel, config.run.seed, config.run.timeout_s)
    startup.done("groups")
    arch = Architecture.from_hf(config.model.hf)
    arch.check_length(config.model.max_length)
    model = build_actor(arch, config.model, config.parallel)
    load_hf(model, config.model.hf)
    startup.done("model")
    train = shared_dataset(config, folder, settings.train, "train")
    validation = shared_dataset(config, folder, settings.validation, "validation") if settings.validation else None
    order = EpochOrder(len(train), config.run.seed, settings.train)
    startup.done("data")
    total_steps = steps_of(settings, len(train))
    if settings.schedule.warmup_steps > total_steps and world.is_main:
        print(
            f"note: {total_steps} steps end within sft.schedule.warmup_steps {settings.schedule.warmup_steps}",
            flush=True,
        )
    actor = Actor(model, config.parallel, settings.optimizer, settings.schedule, total_steps)
    checkpoints = CheckpointFolder(folder / "checkpoints", config, settings.checkpoint)
    startup.done("model")
    resumed = checkpoints.resume({"actor": actor})
    startup.done("checkpoint")
    step, skips = 0, NonfiniteUpdates(config.run.skip_limit)
    if resumed is not None:
        step = resumed.iteration
        order.load_state_dict(resumed.state["order"])
        skips.in_a_row = resumed.state.get("skipped_in_a_row", {})
    log = MetricsLog(folder, config, "sft", step, total_steps) if world.is_main else None
    progress = Progress("sft", total_steps, start=step, unit="tok") if world.is_main else None

    packing = packer_of(config, world)
    while step < total_steps:
        started = time.monotonic()
        batch = [train[index] for _, index in order.next(settings.batch_size)]
        mine = [batch[i] for i in packing.share([len(sequence) for sequence in batch])]
        num_loss_tokens = sum(sum(s.fields["loss_mask"]) for s in batch)
        result = actor.train_step(packing.pack(mine, ["loss_mask"]), TokenLoss(num_loss_tokens))
        step += 1
        warning = skips.count({"actor": [not result.applied]})
        num_tokens, seconds = sum(len(sequence) for sequence in batch), time.monotonic() - started
        last = step == total_steps
        metrics = {
            "sft/loss": result.metrics["loss"],
            "sft/entropy": result.metrics["entropy"],
            "sft/grad_norm": result.grad_norm,
            "sft/learning_rate": result.learning_rate,
            "sft/epoch": order.samples_seen / len(train),
            "sft/tokens_per_s": num_tokens / seconds,
            "time/step_s": seconds,
        }
        if validation and (last or (settings.validate_every and step % settings.validate_every == 0)):
            metrics |= {f"sft/validation_{k}": v for k, v in validate(actor, validation, packing).items()}
            metrics["time/validation_s"] = time.monotonic() - started - seconds
        if log is not None and progress is not None:
            log.log(step, metrics | stopping.metrics(checkpoints.save_time_s))
            startup.finish(folder)
            progress.update(step, num_tokens, {"loss": result.metrics["loss"], "lr": result.learning_rate})
            if warning:
                print(f"warning: step {step}: {warning}", flush=True)
        checkpoints.poll()
        stop = stopping.agreed()
        if last or stop or skips.too_many or step % settings.checkpoint.save_every == 0:
            state = {"order": order.state_dict(), "skipped_in_a_row": skips.in_a_row}
            with stopping.saving():
                checkpoints.save(step, {"actor": actor}, state)
        if skips.too_many:
            checkpoints.finish()
            raise skips.error("sft", step)
        if stop and not last:
            checkpoints.finish()
            raise Saved(f"asked to stop: saved at step {step} of {total_steps}")
    checkpoints.finish()
    if log is not None and progress is not None:
        log.close()
        progress.close()
        # More steps than total_steps were done if they were lowered before this resume.
        mark_done(folder, checkpoint=folder / "checkpoints" / f"iter_{step:07d}")
    runtime.stop()


def steps_of(settings: SftConfig, num_samples: int) -> int:
    """Optimizer steps in all; the last batch is filled from the epoch after."""
    return settings.steps or math.ceil(settings.epochs * num_samples / settings.batch_size)


def validate(actor: Actor, dataset: SftDataset, packing: Packer) -> dict[str, float]:
    """Loss over the whole validation set; the same on every rank."""
    mine = [dataset[index] for index in packing.share(dataset.lengths.tolist())]
    return actor.evaluate(packing.pack(mine, ["loss_mask"]), TokenLoss(dataset.num_loss_tokens))


def shared_dataset(config: Config, folder: Path, source: str, name: str) -> SftDataset:
    """Tokenise once, on the main rank, into RUN/sft/data; every rank maps the arrays. Collective."""
    path = folder / "data" / name

    def tokenise(beat: Callable[[], None]) -> None:
        keys = SftKeys(config.sft.prompt_key, config.sft.response_key, config.sft.messages_key)
        tokenizer = load_tokenizer(config.model.hf)
        with Progress(f"tokenise {name}", 100, unit="samples") as progress:
            seen = 0

            def on_progress(num_samples: int, fraction: float) -> None:
                nonlocal seen
                progress.update(int(100 * fraction), num_samples - seen)
                seen = num_samples
                beat()

            dataset, report = load_sft_dataset(
                source, tokenizer, config.model.max_length, config.sft.bad_samples, keys, on_progress=on_progress
            )
        print(report, flush=True)
        dataset.save(path)

    runtime.on_main(tokenise, f"tokenising {source}")
    return SftDataset.load(path)
