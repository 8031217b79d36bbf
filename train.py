"""Train any system.

    python train.py --model msdm-tiny                                      no data, no weights, no GPU needed
    torchrun --nproc-per-node 4 train.py --model msdm --data clef:DIR      the paper
    python train.py --model msdm --resume latest                           go on exactly where a run stopped

Read from `main` downwards: the order of the file is the order of events.
"""

import math
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import nanomed  # noqa: F401  # isort: skip  # before torch, whose libraries read what it sets when they are loaded
import torch

from nanomed import systems
from nanomed.data import images, ranges
from nanomed.data.prompts import read_prompts
from nanomed.run import flags, runs, signals
from nanomed.run.flags import UsageError
from nanomed.run.hardware import autocast, keep_memory
from nanomed.run.progress import working
from nanomed.run.randomness import seed_all, seed_of
from nanomed.run.ranks import Ranks
from nanomed.run.runs import Run
from nanomed.run.signals import PREEMPTED
from nanomed.training import page


@dataclass
class Config:
    # ---- model
    model: str = "msdm"  # a name from nanomed/systems/__init__.py
    stage: str = ""  # one stage of the model; empty: all of them, in the paper's order
    base: str = ""  # a run whose trained parts this run of one --stage has below and beside its own
    weights: str = ""  # where published files are, besides weights/ and the Hugging Face cache
    frozen: str = "device"  # where parts that do not train live: device, cpu or share (FSDP2); or PART=PLACE,...
    # ---- data
    data: str = "toy"  # toy[:N] | clef:DIR | folder:DIR | kvasir:DIR | ham10000:DIR | skin:DIR, or A*3+B
    range: str = ""  # auto | BITS | LOW:HIGH: greys of more than 8 bits
    size: Annotated[int | None, "1 .. 16384"] = None  # side of the images in pixels; empty: the model's own
    valid: Annotated[float, "0 ..< 1"] = 0.1  # share of the images held out, by image
    augment: bool = True  # random square crops and colour jitter, as the paper; else centre crops
    views: Annotated[int, "0 .. 10000"] = 8  # random crops of an image whose latents are cached; 0: new ones every time
    captions: str = ""  # in place of the data's own: empty, "An endoscopic image of {category}", or a CSV file
    paraphrases: str = ""  # CSV of Prompt,Paraphrase (python -m nanomed.captions.paraphrase makes one)
    strategy: Annotated[str, "add | some | all"] = "add"  # paraphrases as pairs of their own, half the time, or always
    long_prompts: Annotated[str, "cut | refuse | chunk"] = "cut"  # where a text has more tokens than are read of one;
    # chunk: read in pieces of 75, whose states are joined (systems that read CLIP alone)
    dropout: Annotated[float | None, "0 .. 1"] = None  # share of prompts replaced by ""; empty: the model's own
    # ---- optimisation
    steps: Annotated[int, "1 .. 10^9"] = 100_000  # optimizer steps of a stage
    epochs: Annotated[float, "0 .. 10^6"] = 0.0  # passes over the training pairs, in place of a number of steps
    batch: Annotated[int, "1 .. 65536"] = 32  # samples at a time on each process
    accumulate: Annotated[int, "1 .. 65536"] = 1  # backward passes in one step
    lr: Annotated[float, "> 0"] = 1e-4  # learning rate
    schedule: Annotated[str, "constant | cosine | linear"] = "constant"  # of the learning rate, after the warm-up
    warmup: Annotated[int, ">= 0"] = 0  # steps over which the learning rate rises
    weight_decay: Annotated[float, ">= 0"] = 0.0  # of AdamW; the paper's is 0, not AdamW's default
    eps: Annotated[float, "> 0"] = 1e-8  # of AdamW, beside the root of the second moment
    clip: Annotated[float, ">= 0"] = 1.0  # limit on the norm of all gradients; 0 = none
    ema: Annotated[float, "0 ..< 1"] = 0.999  # decay of the averaged weights; 0 = no average
    precision: Annotated[str, "fp32 | bf16 | fp16"] = "fp32"  # of forward passes
    compile: bool = False  # torch.compile the trained network
    # ---- adapter
    lora: str = ""  # adapters to start from, as sample.py takes them: the last one is trained further (any others are
    # folded in), or with --rank all are folded in, below a new one
    rank: Annotated[int, "0 .. 65536"] = 0  # of a low-rank adapter on the stage's parts; 0 = train all their weights
    alpha: Annotated[float, ">= 0"] = 0.0  # the adapter's scale is alpha / rank; 0 = as large as the rank
    adapter: Annotated[str, "lora | rslora | dora | rsdora"] = "lora"  # kind of adapter
    # ---- checkpoints
    save_every: Annotated[int, ">= 1"] = 1000  # steps between checkpoints, each with a validation and a grid
    keep: Annotated[int, ">= 1"] = 2  # checkpoints kept, besides the best
    score_images: Annotated[int, ">= 0"] = 64  # images drawn at a checkpoint to choose the best; 0: by validation loss
    grid_prompts: str = ""  # file of prompts for the grids; empty: the first ones held out
    test_prompts: str = ""  # file of prompts to draw and evaluate at the end
    # ---- run
    out: Annotated[str, "a folder to write"] = "runs"  # where run folders are made
    resume: str = ""  # a run folder or "latest": all settings are that run's, and flags beside it are changes
    resume_anyway: bool = False  # with changes that decide which numbers come next, too; the log and the card say so
    seed: Annotated[int, "0 ..< 2^63"] = 2204  # of everything
    device: str = ""  # cuda, cuda:1, mps or cpu; empty: the best there is
    log_every: Annotated[int, ">= 1"] = 50  # steps between log lines, and between looks for a stop in several processes
    tensorboard: bool = False  # write the curves for TensorBoard too, where it is installed
    cache: Annotated[str, "a folder to write"] = "runs/cache"  # where latents and text states are kept
    dry_run: bool = False  # print parameters, memory, time and disk, then stop


def main() -> int:
    if flags.said("model") == "captioner-tiny":  # no system: it writes captions, and has flags of its own
        from nanomed.captions.__main__ import train as train_captioner

        return train_captioner(sys.argv[1:])
    config, before = read_flags()
    ranges.judge(config.range)
    ranks = Ranks.join(config.device)
    if ranks.device.type == "cpu":
        keep_memory()
    torch.manual_seed(config.seed)  # the same initial weights on every process
    with working(f"making {config.model}"):
        said = systems.chosen(config.model, {name: getattr(config, name) for name in config.given})
        below = (config.rank or starts(config)) and config.precision == "bf16"  # what is frozen below adapters is bf16
        dtype = torch.bfloat16 if below else None
        system = systems.build(config.model, config.weights or None, random=config.dry_run, dtype=dtype, **said)
    system.to(ranks.device, memory_format=torch.channels_last)  # convolutions of small maps run up to twice as fast
    config.recipes = before.get("recipes") or {stage: systems.recipe(config.model, stage) for stage in system.stages}
    check(config, before, system, ranks)
    if config.dry_run:
        from nanomed.training import plan

        for stage in [config.stage] if config.stage else system.stages:
            plan.dry_run(_for_stage(config, stage), system, stage, ranks.device)
        return 0

    stop = signals.StopSignal()
    split = read_data(config, before, system, ranks)
    rows = reversed(split[0].rows + split[1].rows)  # so that the first image of a text is the one that is named
    texts = {text: str(row.file) for row in rows for text in row.prompts + row.paraphrases}
    long, pieces = system.judge_lengths(texts, config.long_prompts, config.data)
    system.pieces = max([1, *pieces.values()])  # of all texts alike, for they share batches
    run = open_run(config, before, system, split, ranks)
    told = f"{len(split[0].rows)} images ({len(split[1].rows) or 'nothing'} held out)"
    run.say(f"{run.folder}: {config.model} on {told}, {ranks.device}\nits page: {run.folder / page.NAME}")
    page.keep(run)
    stop.leave = lambda: run.preempted(stop.received)
    run.say("\n".join(long))
    if told := ranges.told(split[0], config.range) if ranks.first else "":
        run.say(told)
        run.log(**dict(zip(("stage", "step"), run.position())), note=told)
    for stage in dict.fromkeys([*run.state.get("below", ()), *run.state["stages"]]):
        system.resume(stage, run.folder / "model")
    for part in system.parts:
        system.fold_below(run.folder / "model", part)
    system.to(ranks.device, memory_format=torch.channels_last)  # what was read too, or it would round otherwise

    for stage in [config.stage] if config.stage else system.stages:
        if stage in run.state["stages"]:
            continue
        if not train_stage(_for_stage(config, stage, ranks), system, stage, run, split, stop):
            run.preempted(stop.received)
            page.keep(run)
            return PREEMPTED
        stop.later = False
        run.update(stages=[*run.state["stages"], stage])

    results = draw_and_evaluate(config, run, split) if config.test_prompts and not config.stage else {}
    run.finish(results)
    page.keep(run)
    run.say(f"done: {run.folder}\ndraw from it: python sample.py --model {run.folder} --prompts FILE")
    return 0


def read_flags() -> tuple[Config, dict]:
    """The command line, and with --resume what the config.json of that run says, upon which it is read."""
    known = dict(description=__doc__, models=flags.Models(systems.recipe, systems.options, of_stages))
    if not (name := flags.said("resume")):
        return flags.parse(Config, **known), {}
    model = flags.said("model")
    folder = runs.find(name, flags.said("out") or Config.out, model)
    before = runs.settings(folder)
    if model not in ("", before["model"]):
        raise UsageError(f"--resume {folder}: model was {before['model']} and is {model} now; that is another run")
    upon = {name: value for name, value in before.items() if name not in runs.PASSING}
    config = flags.parse(Config, **known, before=upon)
    if "given" not in before:  # a run of 0.1: what is not as the preset has it
        usual = asdict(flags.parse(Config, ["--model", before["model"]], **known))
        before["given"] = [name for name, value in usual.items() if upon.get(name, value) != value]
    config.changed = {name for name in config.given if getattr(config, name) != before.get(name)}
    config.given, config.resume = (*dict.fromkeys([*before["given"], *config.given]),), str(folder)
    config.began = before.get("world", 1)
    runs.compared(folder, before, asdict(config), config.resume_anyway)
    return config, before


def of_stages(model: str) -> str:
    """What the stages of a model have for themselves where no flag is given, for the help."""
    lines = [f"  {stage}: " + " ".join(f"--{name} {value}" for name, value in systems.recipe(model, stage).items())
             for stage in systems.stages_with_recipes(model)]  # fmt: skip
    return "\n".join([f"the stages of {model} have for themselves, where no flag is given:", *lines]) if lines else ""


def check(config: Config, before: dict, system, ranks: Ranks) -> None:
    """Refuse what cannot be trained, before a folder is made."""
    from nanomed.training.placement import places_of

    if config.stage and config.stage not in system.stages:
        raise UsageError(f"--stage {config.stage}: choose {', '.join(system.stages)}")
    if config.base and not before and not config.stage:
        raise UsageError(f"--base {config.base}: say with --stage which one to train on top of it")
    for stage in [config.stage] if config.stage else system.stages:
        own = _for_stage(config, stage, ranks)
        places_of(own.frozen, system, stage)
        for part in system.stages[stage] if own.rank else ():
            if part not in system.adapters:
                raise UsageError(f"--rank {own.rank}: the {part} of stage {stage} has no layers named for adapters")
        if not own.rank:
            system.trainable(stage)
    if getattr(config, "buckets", False) and len(system.bucket_shapes()) == 1:
        raise UsageError(f"--buckets: {config.model} draws images of one shape, {system.size} x {system.size}")
    done = runs.stages_of(config.resume or config.base) if config.resume or config.base else []
    if odd := [stage for stage in done if stage not in system.stages]:
        raise UsageError(f"{config.resume or config.base}: its stage {odd[0]} is none of {config.model}")
    missing = [stage for stage in system.stages if stage not in done]
    if config.stage in missing and system.in_order and config.stage != missing[0] and not config.dry_run:
        raise UsageError(f"--stage {config.stage} builds on stage {missing[0]}: say --resume with a run that has it")
    for file in filter(None, (config.grid_prompts, config.test_prompts)):
        read_prompts(file)


def starts(config: Config) -> bool:
    """Whether an adapter that is given is trained further."""
    return bool(config.lora) and "rank" not in config.given


def read_data(config: Config, before: dict, system, ranks: Ranks):
    """(training, held out): two tables of rows. The toy world is drawn where it is asked for and not there yet. What
    --range auto decides is kept with the settings of the run, and holds when it goes on."""
    from nanomed import data

    table = data.load(config.data, Path(config.cache), system.size)
    same = {name: before.get(name) for name in ("data", "range")} == {"data": config.data, "range": config.range}
    decided = before["ranges"] if same else ranges.of_table(table, config.range) if ranks.first else []
    config.decided = ranks.agree(decided)
    table = ranges.ranged(table, config.decided)
    if ranks.first and not before:
        images.judge(table.rows)
    if system.pad and not getattr(config, "buckets", False):
        table = data.padded(table)
    if config.captions:
        table = data.with_captions(table, config.captions)
    if config.paraphrases:
        table = data.with_paraphrases(table, config.paraphrases, config.strategy)
    table = system.adopt(table)
    for path in filter(None, (config.grid_prompts, config.test_prompts)):  # said now rather than after hours
        system.check_prompts(read_prompts(path, system.columns))
    return table.split(config.valid, config.seed, by_label=None)


def open_run(config: Config, before: dict, system, split, ranks: Ranks) -> Run:
    """The run folder: a fresh one, one to go on with, or a fresh one upon the parts of another."""
    from nanomed.adapters import onto

    contents = ranks.agree([table.digest for table in split] if ranks.first else [])
    given = [name for name in config.given if name not in runs.PASSING]
    settings = asdict(config) | {"world": ranks.world, "given": given, "contents": contents, "ranges": config.decided}
    settings["recipes"] = config.recipes
    if not before:
        started = [config.stage] if config.stage else system.stages
        trained = [part for stage in started for part in system.stages[stage]]
        modules = dict(system.named_children())
        kept = onto.keep(config.lora, modules, trained if starts(config) else ()) if config.lora else []
        run = Run.create(config.out, settings, ranks)
        if config.base:
            run.begin_with(config.base, config.stage, [system.adapter_folder(p) for p in system.stages[config.stage]])
        if ranks.first:
            onto.write(kept, run.folder)
        ranks.barrier()
        return run
    stage, note = longer(config, before, system, Run(config.resume, ranks))
    run = Run.resume(config.resume, settings, ranks, config.resume_anyway)
    if ranks.world != config.began:
        run.say(f"{ranks.world} processes in place of {config.began}: a step has the same samples, in the same order")
    if stage in run.state["stages"]:
        run.reopen(stage)
    elif not {*system.stages} - {*run.state["stages"]}:
        run.say(f"{run.folder}: every stage is finished; --steps N trains on, with more steps than before")
    if note:
        run.log(stage=stage, step=run.position()[1], note=note)
        run.say(f"stage {stage}: {note}")
    return run


def longer(config: Config, before: dict, system, run: Run) -> tuple[str, str]:
    """(stage, what becomes of its learning rate) where a run gets another number of steps: the stage that it is in. One
    that is done takes its last stage up again, or the one of --stage. Else ("", "")."""
    if not {"steps", "epochs"} & config.changed:
        return "", ""
    done, order = run.state["stages"], [*system.stages]
    stage = config.stage or next((other for other in order if other not in done), order[-1])
    old = replace(config, steps=before.get("steps", config.steps), epochs=before.get("epochs", 0.0))
    old.given = tuple(before["given"])
    old.recipes = config.recipes
    old, new = _for_stage(old, stage), _for_stage(config, stage)
    made = run.made(stage)
    if stage in done:
        above = [other for other in done if order.index(other) > order.index(stage)]
        if above and system.in_order:
            raise UsageError(f"--stage {stage}: stage {above[0]} stands on it as it is; train both anew")
        if not made:
            raise UsageError(f"--resume {run.folder}: no checkpoint of stage {stage} is left to go on from")
    if made and not new.epochs and new.steps <= made:
        raise UsageError(f"--steps {new.steps}: stage {stage} has made {made} already")
    if not made or new.schedule == "constant":
        return stage, ""
    was, now = (f"{each.epochs:g} epochs" if each.epochs else f"{each.steps:,} steps" for each in (old, new))
    return stage, f"the {new.schedule} of the learning rate is stretched whole, from {was} to {now}"


def _for_stage(config: Config, stage: str, ranks: Ranks | None = None) -> Config:
    """The settings of one stage: the command line, else the stage's recipe, else what all stages have in common."""
    recipe = {k: v for k, v in config.recipes.get(stage, {}).items() if k not in config.given}
    staged = replace(config, **recipe)
    staged.given, staged.recipes = config.given, config.recipes
    if ranks and config.resume:
        staged.batch, staged.accumulate = ranks.divided(staged.batch, staged.accumulate, config.began)
    return staged


def train_stage(config: Config, system, stage: str, run: Run, split, stop) -> bool:
    """Train one stage to its end; False when it was asked to stop and has saved its state."""
    from nanomed.training import caches
    from nanomed.training.batches import to_device
    from nanomed.training.judge import Judge
    from nanomed.training.log import Log
    from nanomed.training.optimizer import Descent
    from nanomed.training.placement import Placement

    train, ranks = split[0], run.ranks
    system.start_from(stage, run.folder / "start")
    if config.rank and system.bare(stage):
        torch.manual_seed(seed_of(config.seed, "adapter", stage))  # the same start on every process
        system.adapt(stage, config.rank, config.alpha or None, config.adapter)
    placement = Placement(system, stage, config.frozen, ranks, bool(config.stage) or stage == [*system.stages][-1])
    params = system.trainable(stage)
    run.say(system.load_optional(stage, config.weights or None))
    with working(f"stage {stage}: making the optimizer"):  # the first one of a process imports much
        descent = Descent(params, config.weight_decay, config.ema, config.precision == "fp16", config.eps)
    batches = caches.batches(config, system, stage, train, ranks)
    placement.settle()
    together = config.batch * config.accumulate * ranks.world  # samples of one step
    last = math.ceil(config.epochs * len(batches.items) / together) if config.epochs else config.steps
    judge = Judge(config, system, stage, run, split, placement)

    step, state = 0, run.restore(stage, descent)
    if state is not None:
        step, judge.best = state["step"], state["best"]
        if not state["judged"] and (step % config.save_every == 0 or step == last):
            judge.look(step, descent.average)  # the run was stopped just there, in too much of a hurry to look
    run.say(f"stage {stage}: {descent.count:,} parameters train, steps {step:,} to {last:,} of {together} samples")
    for part in system.stages[stage] if config.compile else ():
        system.get_submodule(part).compile()
    model = ranks.parallel(system)
    log = Log(run, stage, (step, last), config.log_every, together)
    stop.later = True  # from here on a stop waits for the end of a step

    while step < last:
        lr = learning_rate(config, step, last)
        for micro in range(config.accumulate):
            batch = to_device(batches[step * config.accumulate + micro], ranks.device)
            seed_all(config.seed, stage, step, micro * ranks.world + ranks.rank, 0)  # all the randomness of this pass
            ends = ranks.world == 1 or micro == config.accumulate - 1  # only then do gradients go between processes
            with nullcontext() if ends else model.no_sync():
                with autocast(config.precision, ranks.device):
                    losses = model(batch, stage, step)
                descent.backward(losses["loss"] / config.accumulate)
        norm, clipped = descent.step(lr, config.clip)
        step += 1
        log.bar.update()

        pausing = step % config.save_every == 0 or step == last
        looking = ranks.world == 1 or pausing or log.due(step)  # processes ask each other only where they wait anyway
        leaving = ranks.any(bool(stop.received)) if looking else False
        if log.due(step) or pausing or leaving:
            skipped = descent.health(stage, step)  # before anything is saved
        if log.due(step):
            log.write(step, losses, norm, clipped=clipped, skipped=skipped, lr=lr)
        if pausing or leaving:
            judged = pausing and (not leaving or step == last)
            if judged:
                judge.look(step, descent.average)
            run.save(stage, step, descent, {"best": judge.best, "judged": judged})
            run.prune(stage, config.keep, judge.best and judge.best["step"])
            log.paused(step)
        if leaving and step < last:
            break

    log.close()
    batches.close()
    if step < last:
        return False
    placement.whole()
    run.take_best(stage, judge.best["step"], params)
    with torch.no_grad():
        measured = system.finish(stage, caches.images_of(train, system.size, ranks.device))
    run.log(stage=stage, step=step, best=judge.best, **measured)
    run.say(f"stage {stage}: {judge.verdict}")
    if ranks.first:
        system.save(run.folder / "model", [*system.stages[stage]])
    ranks.barrier()
    return True


def learning_rate(config: Config, step: int, last: int) -> float:
    """Linear warm-up, then constant, or falling to zero at the last step by a cosine or a line."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(last - config.warmup, 1)
    factors = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}
    return config.lr * factors[config.schedule]


def draw_and_evaluate(config: Config, run: Run, split) -> dict:
    """Draw the prompts of `config.test_prompts` as sample.py does, from what was saved, and measure them as evaluate.py
    does."""
    from nanomed import data
    from nanomed.drawing import Drawing, draw
    from nanomed.evaluation import final, measuring

    system = systems.load(run.folder, config.weights or None, device=run.ranks.device)
    system.to(memory_format=torch.channels_last)
    out = run.folder / "test"
    prompts = read_prompts(config.test_prompts, system.columns)
    how = Drawing(str(out), seed=config.seed, long_prompts=config.long_prompts)
    draw(system, prompts, how, run.ranks, progress=True)
    if not run.ranks.first:
        return {}
    settings = measuring.Settings(weights=config.weights, cache=config.cache)
    toy_world = data.only_toy(config.data)
    if not split[1].rows and not toy_world:
        run.say(f"{out} is not measured: no real images were held out to compare with")
        return {}
    real, spans = [row.file for row in split[1].rows], [row.range for row in split[1].rows]
    results, said = final.measure(out, real, toy_world, settings, spans, config.device)
    print(said)
    return results


if __name__ == "__main__":
    flags.main(main)
