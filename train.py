"""Train any system.

    python train.py --model msdm-tiny                                      no data, no weights, no GPU needed
    torchrun --nproc-per-node 4 train.py --model msdm --data clef:DIR      the paper
    python train.py --model msdm --resume latest                           go on exactly where a run stopped

Read from `main` downwards: the order of the file is the order of events.
"""

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from nanomed.run import flags, signals
from nanomed.run.flags import UsageError
from nanomed.run.hardware import autocast, keep_memory, peak_memory
from nanomed.run.randomness import seed_of
from nanomed.run.ranks import Ranks
from nanomed.run.signals import PREEMPTED
from nanomed.training.optimizer import EMA, AdamW, clip_gradients, number


@dataclass
class Config:
    model: str = "msdm"  # a name from nanomed/systems/__init__.py
    data: str = "toy"  # toy[:N] | clef:DIR | folder:DIR | kvasir:DIR | ham10000:DIR | skin:DIR
    out: str = "runs"  # where run folders are made
    stage: str = ""  # one stage of the model; empty: all of them, in the paper's order
    size: int | None = None  # side of the images in pixels; empty: the model's own
    steps: int = 100_000  # optimizer steps of a stage
    epochs: float = 0.0  # passes over the training pairs, in place of a number of steps
    batch: int = 32  # samples at a time on each process
    accumulate: int = 1  # backward passes in one step
    lr: float = 1e-4  # learning rate
    schedule: str = "constant"  # constant | cosine | linear, after the warm-up
    warmup: int = 0  # steps over which the learning rate rises
    weight_decay: float = 0.0  # of AdamW; the paper's is 0, not AdamW's default
    clip: float = 1.0  # limit on the norm of all gradients; 0 = none
    ema: float = 0.999  # decay of the averaged weights; 0 = no average
    rank: int = 0  # of a low-rank adapter on the stage's parts; 0 = train all their weights
    alpha: float = 0.0  # the adapter's scale is alpha / rank; 0 = as large as the rank
    adapter: str = "lora"  # lora, rslora, dora or rsdora
    text_adapter: str = ""  # Med-Art: kind of T5's adapter, where not as --adapter; none: T5 is left alone
    shard: bool = False  # Med-Art: each process of torchrun holds a share of T5's frozen weights (FSDP2)
    offload: bool = False  # Med-Art: T5 that does not train leaves the GPU once its states are on disk
    released: bool = False  # Kandinsky 2.2: the prior's loss as released, on the decoder's noise schedule
    hldf_every: int | None = None  # Med-Art: steps from one colour loss to the next, 0 = never; empty: the model's own
    hldf_keep: int = 0  # Med-Art: solver steps that keep their activations in it, for speed where there is memory
    hldf_last: int | None = None  # Med-Art: back-propagate it through the last solver steps alone; empty: through all
    snr_gamma: float = 0.0  # min-SNR weighting of the loss; 0 = off
    precision: str = "fp32"  # fp32, bf16 or fp16 autocast
    compile: bool = False  # torch.compile the trained network
    allocator: bool = False  # CPU: keep freed memory instead of returning it (faster steps, more resident memory)
    augment: bool = True  # random square crops and colour jitter, as the paper; else centre crops
    views: int = 8  # random crops of an image whose latents are cached; 0 = encode live, a new crop every time
    captions: str = ""  # in place of the data's own: empty, "An endoscopic image of {category}", or a CSV file
    paraphrases: str = ""  # CSV of Prompt,Paraphrase (python -m nanomed.captions.paraphrase FILE makes one)
    strategy: str = "add"  # add | some | all: paraphrases as pairs of their own, in place with p = 0.5, or always
    dropout: float | None = None  # share of training prompts replaced by ""; empty: the model's own
    join: int = 1  # up to this many prompts of an image in one, drawn anew every time
    places: float = 0.0  # share of samples whose prompt says where something is, beyond those that chance draws
    places_first: int = 0  # steps at the start, in which that share is all of them
    valid: float = 0.1  # share of the images held out, by image
    save_every: int = 1000  # steps between checkpoints, each with a validation and a grid
    keep: int = 2  # checkpoints kept, besides the best
    grid_prompts: str = ""  # file of prompts for the grids; empty: the first ones held out
    score_images: int = 64  # images drawn at every checkpoint to choose the best; 0: choose by validation loss
    test_prompts: str = ""  # file of prompts to draw and evaluate at the end
    seed: int = 2204  # of everything
    log_every: int = 50  # steps between lines of the log
    tensorboard: bool = False  # write the curves for TensorBoard too, where it is installed
    resume: str = ""  # "latest" or a run folder
    base: str = ""  # a run whose trained parts this run of one --stage has below and beside its own
    weights: str = ""  # where published files are, besides weights/ and the Hugging Face cache
    cache: str = "runs/cache"  # where latents and text states are kept
    dry_run: bool = False  # print parameters, memory, time and disk, then stop


IN_THE_LOOP = ("shard", "offload")  # what the loop asks of a system, not its constructor
MODELS_OWN = (*IN_THE_LOOP, "snr_gamma", "text_adapter", "hldf_every", "hldf_keep", "hldf_last", "released")


def main() -> int:
    config = flags.parse(Config, presets=_common_recipe, description=__doc__)
    ranks = Ranks.join()
    if config.allocator:
        keep_memory()

    from nanomed import data, systems
    from nanomed.run import runs
    from nanomed.training import plan

    torch.manual_seed(config.seed)  # the same initial weights on every process
    options = settings_of(config)
    if config.rank and config.precision == "bf16":  # what lies frozen below adapters is held in bf16
        options["dtype"] = torch.bfloat16
    system = systems.build(config.model, config.weights or None, random=config.dry_run, **options)
    system.to(ranks.device, memory_format=torch.channels_last)  # convolutions of small maps run up to twice as fast
    if config.dry_run:
        for stage in [config.stage] if config.stage else system.stages:
            plan.dry_run(_for_stage(config, stage), system, stage, ranks.device)
        return 0

    stop = signals.StopSignal()
    table = data.load(config.data, Path(config.cache), system.size)
    if system.pad:
        table = data.padded(table)
    if config.captions:
        table = data.with_captions(table, config.captions)
    if config.paraphrases:
        table = data.with_paraphrases(table, config.paraphrases, config.strategy)
    train, valid = table.split(config.valid, config.seed, by_label=bool(table.rows[0].label))
    settings = asdict(config) | {"world": ranks.world}
    if config.resume:
        found = runs.newest(config.out, config.model) if config.resume == "latest" else config.resume
        if found is None:
            raise UsageError(f"--resume latest: no run of {config.model} in {config.out}")
        run = runs.Run.resume(found, settings, ranks)
    else:
        if config.base and config.stage not in system.stages:
            raise UsageError(f"--base {config.base}: say with --stage which one to train on top of it")
        run = runs.Run.create(config.out, settings, ranks)
        if config.base:
            run.begin_with(config.base, config.stage, [system.adapter_folder(p) for p in system.stages[config.stage]])
    if ranks.first:
        print(f"{run.folder}: {config.model} on {len(train.rows)} images ({len(valid.rows)} held out), {ranks.device}")

    for stage in dict.fromkeys([*run.state.get("below", ()), *run.state["stages"]]):
        system.resume(stage, run.folder / "model")
    system.to(ranks.device, memory_format=torch.channels_last)  # what was read too, or it would round otherwise
    for stage in [config.stage] if config.stage else system.stages:
        if stage in run.state["stages"]:
            continue
        before = [other for other in system.stages if other not in run.state["stages"]][0]
        if before != stage and system.in_order:
            raise UsageError(
                f"--stage {stage} builds on stage {before}: say --resume with a run that has trained it"
            )
        finished = train_stage(_for_stage(config, stage), system, stage, run, train, valid, stop, ranks)
        if not finished:
            run.update(status="preempted")
            if ranks.first:
                print(f"{stop.received}: state saved; go on with --resume {run.folder}")
            return PREEMPTED
        run.update(stages=[*run.state["stages"], stage])

    results = {}
    system.fold()
    if config.test_prompts and not config.stage:
        results = draw_and_evaluate(config, system, run, valid, ranks)
    if ranks.first:
        from nanomed.run import files

        files.write_text(run.folder / "README.md", runs.model_card(settings, results))
        print(f"done: {run.folder}\ndraw from it: python sample.py --model {run.folder} --prompts FILE")
    run.update(status="done")
    return 0


def settings_of(config: Config) -> dict:
    """The flags that are settings of the model itself, as far as they say something; UsageError for another model's."""
    from nanomed import systems

    own = systems.flags(config.model)
    for name in config.given:
        if name in MODELS_OWN and name not in own:
            raise UsageError(f"--{name}: {config.model} has no such setting")
    options = {name: getattr(config, name) for name in own if name in config.given or getattr(config, name)}
    return {name: value for name, value in options.items() if name not in IN_THE_LOOP}


def _common_recipe(model: str) -> dict:
    from nanomed import systems

    return systems.recipe(model)


def _for_stage(config: Config, stage: str) -> Config:
    """The settings of one stage: the command line, else the stage's recipe, else what all stages have in common."""
    from nanomed import systems

    recipe = {k: v for k, v in systems.recipe(config.model, stage).items() if k not in config.given}
    staged = replace(config, **recipe)
    staged.given = config.given
    return staged


def train_stage(config, system, stage, run, train, valid, stop, ranks) -> bool:
    """Train one stage to its end; False when it was asked to stop and has saved its state."""
    from nanomed.training import caches
    from nanomed.training.judge import Judge

    rank, world, device = ranks.rank, ranks.world, ranks.device

    if config.rank:
        torch.manual_seed(seed_of(config.seed, "adapter", stage))  # the same start on every process
        system.adapt(stage, config.rank, config.alpha or None, config.adapter)
    if config.shard and world > 1 and stage == "adapters":
        system.shard(device)
    params = system.trainable(stage)
    if (missing := system.load_optional(stage, config.weights or None)) and rank == 0:
        print(missing)
    optimizer = AdamW(params.values(), lr=config.lr, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    ema = EMA(params, config.ema) if config.ema else None
    step, best, skipped, in_a_row = 0, None, 0, 0
    if (state := run.restore(stage, params, optimizer, ema and ema.average)) is not None:
        step, best, skipped = state["step"], state["best"], state["skipped"]
        if ema:
            ema.updates = state["ema_updates"]
        if scaler.is_enabled():
            scaler.load_state_dict(state["scaler"])
    batches = caches.batches(config, system, stage, train, ranks)
    if config.epochs:
        config.steps = math.ceil(config.epochs * len(batches.items) / (config.batch * config.accumulate * world))
    if ranks.first:
        count = sum(p.numel() for p in params.values())
        print(
            f"stage {stage}: {count:,} parameters train, steps {step:,} to {config.steps:,} of {config.batch} x {world}"
        )
    judge = Judge(config, system, stage, run, valid, ranks)
    if config.compile:
        for part in system.stages[stage]:
            system.get_submodule(part).compile()
    progress = tqdm(total=config.steps, initial=step, desc=stage, unit="step", disable=rank > 0, mininterval=1.0)
    since, seen = time.monotonic(), step

    def better(step: int, best: dict | None) -> dict:
        score = judge(step, ema)
        return {"step": step, "score": score, "by": judge.measure} if not best or score < best["score"] else best

    if state is not None and not state["judged"] and (step % config.save_every == 0 or step == config.steps):
        best = better(step, best)  # the run was stopped just there, in too much of a hurry to look

    while step < config.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        for micro in range(config.accumulate):
            batch = to_device(batches[step * config.accumulate + micro], device)
            torch.manual_seed(seed_of(config.seed, stage, step, micro, rank))  # all the randomness of this pass
            with autocast(config.precision, device):
                losses = system(batch, stage, step)
            scaler.scale(losses["loss"] / config.accumulate).backward()
        ranks.average_gradients(params.values())
        scaler.unscale_(optimizer)
        norm, clipped = clip_gradients(list(params.values()), config.clip)

        broken = ranks.any(not torch.isfinite(norm + losses["loss"].detach()).item())
        if not broken or scaler.is_enabled():  # the fp16 scaler itself skips steps that overflow, and scales down
            scaler.step(optimizer)
            scaler.update()
            if ema and not broken:
                ema.update()
        in_a_row = in_a_row + 1 if broken and not scaler.is_enabled() else 0
        skipped += broken
        optimizer.zero_grad()
        step += 1
        progress.update()

        if step % config.log_every == 0 or step == config.steps or broken:
            pace = (step - seen) / max(time.monotonic() - since, 1e-9)
            shown = {name: round(value.item(), 6) for name, value in losses.items() if torch.isfinite(value)}
            progress.set_postfix(loss=shown.get("loss"), refresh=False)
            rate = pace * config.batch * config.accumulate * world
            entry = {"loss": None} | shown | {"grad_norm": number(norm), "clipped": clipped, "skipped": skipped}
            entry |= {"lr": learning_rate(config, step - 1), "images_per_second": round(rate, 2)}
            run.log(stage=stage, step=step, **entry, memory_gb=round(peak_memory(device) / 1e9, 3))
            since, seen = time.monotonic(), step
        if in_a_row == 3:
            raise FloatingPointError(
                f"{stage}: loss or gradient was not finite for 3 steps in a row, up to step {step}; the weights are "
                f"those before them. Lower --lr, or use --precision bf16 or fp32"
            )
        leaving = ranks.any(bool(stop.received))
        if step % config.save_every == 0 or step == config.steps or leaving:
            judged = not leaving or step == config.steps
            best = better(step, best) if judged else best
            made = {"best": best, "judged": judged, "skipped": skipped, "ema_updates": ema.updates if ema else 0}
            run.save(stage, step, params, optimizer, ema and ema.average, made | {"scaler": scaler.state_dict()})
            run.prune(stage, config.keep, best and best["step"])
            since, seen = time.monotonic(), step
            if leaving and step < config.steps:
                progress.close()
                batches.close()
                return False

    progress.close()
    batches.close()
    with torch.no_grad():
        for name, tensor in run.weights_of(stage, best["step"]).items():
            params[name].copy_(tensor)
        measured = system.finish(stage, caches.images_of(train, system.size, device))
    run.log(stage=stage, step=step, best=best, **measured)
    if ranks.first:
        print(f"stage {stage}: keeping step {best['step']}, the lowest {best['by']} ({best['score']:.4f})")
        system.save(run.folder / "model", [*system.stages[stage]])
    ranks.barrier()
    return True


def draw_and_evaluate(config: Config, system, run, valid, ranks: Ranks) -> dict:
    """Draw the prompts of `config.test_prompts` as sample.py does and measure them as evaluate.py does."""
    from nanomed.data.prompts import read_prompts
    from nanomed.drawing import Drawing, draw
    from nanomed.evaluation import final, measuring

    out = run.folder / "test"
    draw(system, read_prompts(config.test_prompts), Drawing(str(out), seed=config.seed), ranks, progress=True)
    if not ranks.first:
        return {}
    settings = measuring.Settings(weights=config.weights, cache=config.cache)
    results, said = final.measure(out, [row.file for row in valid.rows], config.data.startswith("toy"), settings)
    print(said)
    return results


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then constant, or falling to zero at the last step by a cosine or a line."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(config.steps - config.warmup, 1)
    factors = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}
    if config.schedule not in factors:
        raise UsageError(f"--schedule {config.schedule}: choose constant, cosine or linear")
    return config.lr * factors[config.schedule]


def to_device(batch: dict, device: torch.device) -> dict:
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


if __name__ == "__main__":
    flags.main(main)
