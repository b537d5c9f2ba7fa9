"""`moltbot model …`: the options and the help of each of its commands. What they do is imported when they are run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

from moltbot_server.cli.under import add_under, overview

_OVERVIEW = """\
Find, fetch, convert, try and switch models.
A model is a folder with CTranslate2 weights, a tokenizer and a chat template. The built-in one is always there."""
_EXAMPLES = """\
examples:
  moltbot model list
  moltbot model add ~/models/tinyllama-ct2 --type tinyllama
  moltbot model pull acme/tinyllama-ct2
  moltbot model convert ~/models/TinyLlama-1.1B-Chat
  moltbot model switch tinyllama-ct2

docs/models.md is the guide."""
_WHICH = "the model, or a folder (default: the model that answers at start)"
_QUANTIZATIONS = ("int8", "int8_float32", "int8_float16", "int8_bfloat16", "int16", "float16", "bfloat16", "float32")

_Run = Callable[[argparse.Namespace], int]
_Add = Callable[..., argparse.ArgumentParser]


def add_model(add: _Add) -> None:
    """Add the command with all commands under it."""
    model = add("model", overview, _OVERVIEW)
    model.epilog = _EXAMPLES
    model.set_defaults(parser=model)
    under = model.add_subparsers(metavar="COMMAND", title="commands")

    sub = partial(add_under, under)

    _add_looking(sub)
    _add_getting(sub)
    _add_changing(sub)
    _add_measuring(sub)


def _add_looking(sub: _Add) -> None:
    sub(
        "list",
        _list,
        "List the models of the workspace.\nThose that run say so: which one answers, and what memory they take.",
        "moltbot model list",
        "moltbot model list --json",
    )
    show = sub(
        "show",
        _show,
        "Show one model: where it lies, what it can do, how it counts, and what is wrong with it if something is.",
        "moltbot model show moltbot-demo",
    )
    show.add_argument("name", metavar="NAME")


def _add_getting(sub: _Add) -> None:
    added = sub(
        "add",
        _add_folder,
        "Add a folder of your own. It stays where it is.\n"
        "It needs CTranslate2 weights (model.bin), a vocabulary, a tokenizer and a chat template; what is missing is "
        "told.\nGiven a model that is known already, --type corrects its family.",
        "moltbot model add ~/models/tinyllama-ct2",
        "moltbot model add ./llama2-ct2 --name llama --type llama2",
    )
    added.add_argument("path", metavar="PATH", help="the folder, or the name of a model that is known")
    added.add_argument("--name", help="what to call it (default: what the folder says, or the folder's own name)")
    added.add_argument("--type", default="", metavar="FAMILY", help="its family, where the folder does not say it")
    pull = sub(
        "pull",
        _pull,
        "Fetch a model from a hub that speaks the layout of Hugging Face.\n"
        "Ctrl-C and a broken line lose nothing: the same command goes on where it stopped. Every file is checked.\n"
        "MOLTBOT_HUB names another hub, such as https://hf-mirror.com; MOLTBOT_HUB_TOKEN opens private models.",
        "moltbot model pull acme/tinyllama-ct2",
        "moltbot model pull acme/tinyllama-ct2@v1.0 --name tiny",
        "moltbot model pull https://hf-mirror.com/acme/tinyllama-ct2",
    )
    pull.add_argument("source", metavar="NAME_OR_URL", help="org/name, org/name@revision, or the address of its page")
    pull.add_argument("--name", help="what to call it (default: the repository's own name)")
    pull.add_argument("--revision", default="", metavar="REV", help="a branch, a tag or a commit (default: main)")
    pull.add_argument("--type", default="", metavar="FAMILY", help="its family, where the folder does not say it")
    text = "fetch the files of this pattern only; may be repeated (default: what a model needs)"
    pull.add_argument("--include", action="append", default=[], metavar="PATTERN", help=text)
    convert = sub(
        "convert",
        _convert,
        "Convert weights of Transformers (safetensors) into a model that MoltBot runs.\n"
        "It needs the extra `convert`, which docs/models.md says how to install. The source stays as it is.",
        "moltbot model convert ~/models/TinyLlama-1.1B-Chat",
        "moltbot model convert tinyllama-1.1b-chat --name tiny --quantization int8_float32",
    )
    convert.add_argument("source", metavar="SOURCE", help="a folder, or the name of a model that was pulled")
    convert.add_argument("--name", help="what to call the result (default: the source's name and the number type)")
    convert.add_argument(
        "--quantization", choices=_QUANTIZATIONS, default="int8", help="the number type of the weights (default: int8)"
    )


def _add_changing(sub: _Add) -> None:
    remove = sub(
        "remove",
        _remove,
        "Forget a model.\nThe files of one that was pulled or converted are deleted; a folder that you added stays.",
        "moltbot model remove tinyllama-ct2",
    )
    remove.add_argument("name", metavar="NAME")
    switch = sub(
        "switch",
        _switch,
        "Let another model answer, without a stop.\n"
        "It is loaded beside the one that answers, tried, and takes its place in one step; turns under way end with "
        "the old one.\nA model that cannot answer changes nothing. While MoltBot does not run, the choice is kept for "
        "the next start.",
        "moltbot model switch tinyllama-ct2",
        "moltbot model switch tinyllama-ct2 --default",
        "moltbot model switch --configured",
    )
    switch.add_argument("name", metavar="NAME", nargs="?", default="")
    switch.add_argument("--default", action="store_true", help="let it answer from the next start on, too")
    switch.add_argument("--keep", action="store_true", help="keep the one before loaded, for those who name it")
    text = "leave it to the configuration again which model answers from the next start on"
    switch.add_argument("--configured", action="store_true", help=text)


def _add_measuring(sub: _Add) -> None:
    tune = sub(
        "tune",
        _tune,
        "Measure how a model runs best on this machine, and keep that for the next start.\n"
        "Replicas, threads, batch and number type are tried under a load like the server's.",
        "moltbot model tune",
        "moltbot model tune tinyllama-ct2 --quick",
    )
    tune.add_argument("name", metavar="NAME", nargs="?", default="", help=_WHICH)
    tune.add_argument("--quick", action="store_true", help="try little, for a first figure")
    bench = sub(
        "bench",
        _bench,
        "Measure a model's tokens per second and its first token, alone and with many streams at once.\n"
        "It is loaded beside whatever runs; `moltbot bench local` measures through the server.",
        "moltbot model bench moltbot-demo",
        "moltbot model bench tinyllama-ct2 --streams 1,4,16 --json",
    )
    bench.add_argument("name", metavar="NAME", nargs="?", default="", help=_WHICH)
    bench.add_argument("--streams", default="1,8,16", metavar="N,N", help="streams at once (default: 1,8,16)")
    bench.add_argument("--seconds", type=float, default=3.0, help="how long each is measured (default: 3)")
    bench.add_argument("--prompt", type=int, default=128, metavar="TOKENS", help="tokens of each prompt (default: 128)")
    bench.add_argument("--new", type=int, default=64, metavar="TOKENS", help="most tokens of an answer (default: 64)")


def _list(given: argparse.Namespace) -> int:
    from moltbot_server.cli.model_looking import list_models

    return list_models(given)


def _show(given: argparse.Namespace) -> int:
    from moltbot_server.cli.model_looking import show_model

    return show_model(given)


def _add_folder(given: argparse.Namespace) -> int:
    from moltbot_server.cli.model_changing import add_model

    return add_model(given)


def _remove(given: argparse.Namespace) -> int:
    from moltbot_server.cli.model_changing import remove_model

    return remove_model(given)


def _switch(given: argparse.Namespace) -> int:
    from moltbot_server.cli.model_changing import switch_model

    return switch_model(given)


def _pull(given: argparse.Namespace) -> int:
    from moltbot_server.cli.model_getting import pull_model

    return pull_model(given)


def _convert(given: argparse.Namespace) -> int:
    from moltbot_server.cli.model_getting import convert_model

    return convert_model(given)


def _tune(given: argparse.Namespace) -> int:
    from moltbot_server.cli.model_measuring import tune_model

    return tune_model(given)


def _bench(given: argparse.Namespace) -> int:
    from moltbot_server.cli.model_measuring import bench_model

    return bench_model(given)
