"""Trains SmolLM2-135M-Instruct to use 64K tokens, as a low-rank adapter: `scripts/train_long_context.py --help`.

prepare DATA.npz --text FOLDER...    tokens of texts and of made-up questions, once, on a CPU
train DATA.npz FOLDER                trains for --minutes in all; --resume goes on
scale FOLDER SCALED --share 0.75     an adapter between the base model and this one
merge FOLDER MODEL                   a model to evaluate: --model MODEL
plot FOLDER PICTURE.png              the loss over the tokens seen
"""

from __future__ import annotations

import argparse
import sys
from importlib import resources
from pathlib import Path

import torch

# The project's packages, where it is not installed.
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from ds_offload.adapter import change_config, merge_adapter
from ds_offload.errors import InputError
from ds_offload.loading import find_model, load_tokenizer, load_weights
from long_context.adapted_llama import AdaptedLlama, AdapterShape
from long_context.adapter_files import scale_adapter
from long_context.attention_kernels import fastest_attention
from long_context.loss_curve import draw_curve, read_log
from long_context.trainer import LOG, Plan, Trainer
from long_context.training_data import AMOUNTS, TrainingData
from long_context.training_sequences import SequenceMaker
from long_context.training_texts import read_source, without, word_runs

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def prepare(options: argparse.Namespace) -> None:
    """Write the file of training sequences."""
    tokenizer = load_tokenizer(find_model(options.model))
    held_out = [text for place in options.held_out for text in read_source(place)]
    # What evaluations and calibration read comes with the package.
    data = resources.files("ds_offload").joinpath("data")
    held_out += [data.joinpath(name).read_text(encoding="utf-8") for name in ("jargon_file.txt", "calibration.txt")]
    runs = word_runs(held_out)
    texts = {str(place): without(read_source(place), runs) for place in options.text}
    for name, text in texts.items():
        print(f"{name}: {len(text):,} characters")
    amounts = dict(options.amount) if options.amount else AMOUNTS
    maker = SequenceMaker(texts, tokenizer)
    made = TrainingData.make(maker, tokenizer.convert_tokens_to_ids("1"), amounts, f"train {options.seed}")
    made.save(options.data)
    print(f"{options.data}: {options.data.stat().st_size / 2**20:.1f} MiB")


def train(options: argparse.Namespace) -> None:
    """Train, or go on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    loaded = load_weights(find_model(options.model, dtype="fp32"), device)
    shape = AdapterShape(rope_theta=options.rope_theta, max_positions=options.max_positions)
    model = AdaptedLlama.from_model(loaded.model, shape, dtype, options.seed)
    model.attention = fastest_attention(loaded.model.config.num_attention_heads, model.config.head_dim, device)
    model.checkpoint_from = options.checkpoint_from
    if options.compile:
        model.compile()
    plan = Plan(
        options.minutes,
        options.steps,
        options.rate,
        step_tokens=options.step_tokens,
        skipped=options.skipped,
        text_weight=options.text_weight,
        seed=options.seed,
    )
    trainer = Trainer(model, TrainingData.load(options.data), plan, options.folder, BASE)
    if options.resume:
        trainer.resume()
    trainer.run(60 * options.stop_after)
    if device.type == "cuda":
        print(f"at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory")


def scale(options: argparse.Namespace) -> None:
    """Write an adapter with a share of the changes."""
    loaded = load_weights(find_model(options.model, dtype="fp32"), torch.device("cpu"))
    scale_adapter(options.folder, options.scaled, loaded.model, options.share)


def merge(options: argparse.Namespace) -> None:
    """Write a model folder with the adapter that training has reached."""
    loaded = load_weights(find_model(options.model, dtype="fp32"), torch.device("cpu"))
    change_config(loaded.model.config, options.folder)
    merge_adapter(loaded.model, options.folder)
    loaded.model.to(torch.bfloat16).save_pretrained(options.merged)
    loaded.tokenizer.save_pretrained(options.merged)


def plot(options: argparse.Namespace) -> None:
    """Draw the loss curve."""
    draw_curve(read_log(options.folder / LOG), options.picture)


def _amount(text: str) -> tuple[int, int]:
    length, tokens = text.split("=")
    return int(length), int(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("prepare", help="make the file of training sequences")
    command.set_defaults(run=prepare)
    command.add_argument("data", type=Path)
    command.add_argument("--text", type=Path, nargs="+", required=True, help="text files, or folders of them")
    command.add_argument("--held-out", type=Path, nargs="*", default=[], help="texts of evaluations, to leave out")
    command.add_argument("--amount", type=_amount, nargs="*", help="LENGTH=TOKENS of each length of a sequence")
    command = commands.add_parser("train", help="train, or go on with --resume")
    command.set_defaults(run=train)
    command.add_argument("data", type=Path)
    command.add_argument("folder", type=Path)
    command.add_argument("--minutes", type=float, default=Plan.minutes, help="of all runs together")
    command.add_argument("--steps", type=int, help="instead of --minutes")
    command.add_argument("--stop-after", type=float, default=8.5, help="minutes of this run")
    command.add_argument("--resume", action="store_true")
    command.add_argument("--compile", action="store_true", help="compile what is around attention")
    command.add_argument("--rate", type=float, default=Plan.rate, help="highest learning rate")
    command.add_argument("--step-tokens", type=int, default=Plan.step_tokens)
    command.add_argument(
        "--skipped", type=float, default=Plan.skipped, help="share of sequences with gaps in positions"
    )
    command.add_argument("--text-weight", type=float, default=Plan.text_weight)
    command.add_argument("--rope-theta", type=float, default=AdapterShape.rope_theta)
    command.add_argument("--max-positions", type=int, default=AdapterShape.max_positions)
    command.add_argument("--checkpoint-from", type=int, default=AdaptedLlama.checkpoint_from, help="tokens")
    command = commands.add_parser("scale", help="write an adapter between the base model and this one")
    command.set_defaults(run=scale)
    command.add_argument("folder", type=Path)
    command.add_argument("scaled", type=Path)
    command.add_argument("--share", type=float, required=True, help="of the way to the adapter, from 0 to 1")
    command = commands.add_parser("merge", help="write a model folder with the adapter in its weights")
    command.set_defaults(run=merge)
    command.add_argument("folder", type=Path)
    command.add_argument("merged", type=Path)
    for command in commands.choices.values():
        command.add_argument("--model", default="smollm2-135m")
        command.add_argument("--seed", type=int, default=Plan.seed)
    command = commands.add_parser("plot", help="draw the loss curve")
    command.set_defaults(run=plot)
    command.add_argument("folder", type=Path)
    command.add_argument("picture", type=Path)
    options = parser.parse_args()
    try:
        options.run(options)
    except (InputError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
