"""Rules about header.json: it is complete, it agrees with itself, and what can be made again is equal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from distill import __version__, chat
from distill.artifacts import code_version
from distill.config import as_dict, build
from distill.data import toy
from distill.data.budget import Prices
from distill.data.episodes import Protocol
from distill.data.mix_config import OPERATIONAL, MixConfig
from distill.data.prompts.contamination import labels_of
from distill.data.rules.whole import Whole
from distill.data.schema import Header, LogprobInfo, Teacher, run_id_of
from distill.data.scripted import make as scripted
from distill.data.teacher.probe import Capabilities
from distill.data.teacher.spec import Sampling
from distill.errors import InputError
from distill.tokenizer import Tokenizer

SHA256 = re.compile(r"[0-9a-f]{64}")
_NOT_OF_THE_MIX = {"seed", "total"}
"""Keys of a header's configuration that the command line gives."""
MOST_RECORDS = 10**9
"""That are asked for: of more, nobody works out the quotas."""


def header_problems(header: Header, tokenizer: Tokenizer | None) -> Iterator[str]:
    """Everything that must be known is stated, and what can be made again is equal."""
    hashes = {name: getattr(header, name) for name in header.__struct_fields__ if name.endswith("_sha256")}
    hashes |= {f"files.{name}": digest for name, digest in header.files.items()}
    hashes |= {f"decontamination.{name}": digest for name, digest in header.decontamination.items()}
    hashes["teacher.weights_sha256"] = header.teacher.weights_sha256
    for name, digest in hashes.items():
        if digest is not None and not SHA256.fullmatch(digest):
            yield f"{name} is not a sha256"
    if wrong := {"package", "version", "code"} ^ {name for name, value in header.created_by.items() if value}:
        yield f"created_by lacks or should not have {', '.join(sorted(wrong))[:200]}"
    elif header.created_by["package"] != "distill":
        yield "created_by names another package than distill"
    elif header.created_by["code"] == code_version() and header.created_by["version"] != __version__:
        yield "created_by names a version that this code is not"
    if header.run_id != run_id_of(header):
        yield "run_id is not that of configuration, sampling, teacher, tokenizer and template"
    yield from _teacher_problems(header)
    if header.template_sha256 != chat.template_sha256():
        yield "template_sha256 is not that of this version's chat template"
    if header.logprobs is not None and header.tokenizer_sha256 is None:
        yield "tokenizer_sha256 is null, though there are distributions"
    if tokenizer is not None and header.tokenizer_sha256 != tokenizer.sha256:
        yield "tokenizer_sha256 is not that of tokenizer.json"
    if header.text_only != (header.logprobs is None):
        yield "text_only is not what logprobs says"
    problems = {"toy": toy_problems, "scripted": scripted_problems}.get(header.teacher.kind, _mix_problems)
    yield from problems(header)


def _teacher_problems(header: Header) -> Iterator[str]:
    teacher = header.teacher
    wanted = {
        "host": teacher.kind == "endpoint", "weights_sha256": teacher.kind in ("gguf", "hf"), "model": True,
        "logits_engine": header.logprobs is not None and teacher.kind != "endpoint", "text_engine": True,
    }  # fmt: skip
    for name, needed in wanted.items():
        if needed and not getattr(teacher, name):
            yield f"teacher lacks {name}"


def toy_problems(header: Header) -> Iterator[str]:
    """Of a toy set, of which no rule asks how it was generated: it is what distill/data/toy.py makes."""
    config = header.config
    if set(config) != {"kind", "n", "seed"} or config["kind"] not in toy.KINDS:
        yield "config is not that of a toy set"
        return
    made = toy.header_of(config["kind"], config["n"], config["seed"])
    given = {"prompts_sha256", "tools_sha256", "created_by", "counts", "files"}  # of the records, the code, the files
    for name in header.__struct_fields__:
        if name not in given and _stated(getattr(header, name)) != getattr(made, name):
            yield f"{name} is not that of a toy set"
    if header.counts.get("records") != config["n"]:
        yield f"a toy set of {str(config['n'])[:40]} has other counts"


def scripted_problems(header: Header) -> Iterator[str]:
    """Of a scripted set: it is what distill/data/scripted/make.py makes, whatever the tokenizer."""
    config = header.config
    numbers = [config.get(name) for name in ("n", "seed")]
    whole = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
    if set(config) != {"n", "seed", "val_share"} or not whole or not 1 <= config["n"] <= MOST_RECORDS:
        yield "config is not that of a scripted set"
        return
    made = scripted.header_of(config["n"], config["seed"])
    given = {"prompts_sha256", "tools_sha256", "created_by", "counts", "files", "tokenizer_sha256", "run_id"}
    for name in header.__struct_fields__:
        if name not in given and getattr(header, name) != getattr(made, name):
            yield f"{name} is not that of a scripted set"


def _stated(value: Any) -> Any:
    """A part of a header as it is before the store is written."""
    return msgspec.structs.replace(value, kl_to_exact={}) if isinstance(value, LogprobInfo) else value


def _mix_problems(header: Header) -> Iterator[str]:
    """Of a generated set: the configuration is a whole mix, and the other parts are what it gives."""
    for name, value, kind in (("sampling", header.sampling, Sampling),
                              ("capabilities", header.capabilities, Capabilities)):  # fmt: skip
        if missing := [field for field in kind.__struct_fields__ if field not in value]:
            yield f"{name} lacks {', '.join(missing)}"
        elif isinstance(problem := _converted(value, kind, name), str):
            yield problem
    wanted = {name for name in MixConfig.__struct_fields__ if name not in OPERATIONAL} | _NOT_OF_THE_MIX
    if missing := sorted(wanted - set(header.config)):
        yield f"config lacks {', '.join(missing)}"
        return
    mix = mix_of(header)
    if isinstance(mix, str):
        yield mix
        return
    for name in ("licence", "quota_tolerance", "near_duplicates"):
        if getattr(header, name) != getattr(mix, name):
            yield f"{name} is not that of config"
    for name in ("temperature", "top_p", *(("max_tokens",) if mix.max_tokens else ())):
        if header.sampling.get(name) != getattr(mix, name):
            yield f"sampling's {name} is not that of config"
    if set(header.decontamination) != set(labels_of(mix.decontaminate)):
        yield "decontamination names other evaluation sets than config"
    yield from _quota_problems(header, mix)


def _quota_problems(header: Header, mix: MixConfig) -> Iterator[str]:
    if sum(header.quotas.values()) != header.config["total"]:
        yield f"quotas sum to {sum(header.quotas.values())}, config's total is {str(header.config['total'])[:40]}"
    if not mix.sources and (unknown := sorted(set(header.quotas) - set(mix.strata))):
        yield f"quotas names strata that config does not: {', '.join(unknown)[:200]}"


def mix_of(header: Header) -> MixConfig | str:
    """The mix that a header's configuration is, or why it is none."""
    given = {name: value for name, value in header.config.items() if name not in _NOT_OF_THE_MIX}
    if unknown := sorted(OPERATIONAL & set(given)):
        return f"config holds {', '.join(unknown)}, which is no part of what the answers depend on"
    for name in _NOT_OF_THE_MIX:
        if not isinstance(header.config.get(name), int) or isinstance(header.config.get(name), bool):
            return f"config: {name} is not a whole number"
    if not 1 <= header.config["total"] <= MOST_RECORDS:
        return f"config: total is not from 1 to {MOST_RECORDS:,}"
    try:
        mix = build(given, MixConfig, "config")
    except InputError as error:
        return str(error)
    same = {name: value for name, value in as_dict(mix).items() if name in given} == given
    return mix if same else "config: holds values that no mix has"


def _converted(value: dict[str, Any], kind: type[msgspec.Struct], name: str) -> msgspec.Struct | str:
    try:
        return build(value, kind, name)
    except InputError as error:
        return str(error)


def capabilities_of(header: Header) -> Capabilities | None:
    """What the probe found, if the header says so in full."""
    found = _converted(header.capabilities, Capabilities, "capabilities")
    return found if isinstance(found, Capabilities) else None


def prices_of(header: Header) -> Prices | None:
    """The prices in a header's configuration, if they are some."""
    try:
        return msgspec.convert(header.config.get("prices"), Prices | None)
    except (msgspec.ValidationError, ValueError):
        return None


def identity_of(header: Header) -> Teacher:
    """The teacher as it was known before it said anything."""
    return msgspec.structs.replace(header.teacher, server=None, models_seen=(), system_fingerprints_seen=())


def protocol_of(header: Header) -> Protocol | None:
    """How the teacher was asked; None where nothing was, and where the header does not say."""
    if not header.teacher.asked:
        return None
    mix, can = mix_of(header), capabilities_of(header)
    sampling = _converted(header.sampling, Sampling, "sampling")
    if isinstance(mix, str) or can is None or not isinstance(sampling, Sampling):
        return None
    endpoint = header.teacher.kind == "endpoint"
    return Protocol(
        identity_of(header), "chat" if endpoint else "completions", sampling, header.config["seed"],
        max_turns=mix.max_turns, top_logprobs=header.logprobs.k if endpoint and header.logprobs else 0,
        logprobs_with_tools=can.logprobs_with_tools, max_tokens_field=can.max_tokens_field,
        learn_reasoning=mix.reasoning == "learn",
    )  # fmt: skip


def total_problems(header: Header, whole: Whole, rejected: int, *, deep: bool) -> Iterator[str]:
    """The header's counts, and the hashes of the ids and the tools, are those of the records."""
    counts = whole.counts | {"rejected": rejected}
    wrong = {name: n for name, n in counts.items() if header.counts.get(name) != n}
    if wrong:
        yield f"counts differ from the files': {wrong}"
    tokens = {"completion_tokens"} if header.logprobs else set()  # the store says how many
    if odd := sorted((set(counts) | tokens) ^ set(header.counts)):
        yield f"counts lacks or should not have {', '.join(odd)[:200]}"
    if header.prompts_sha256 != whole.prompts_sha256:
        yield "prompts_sha256 is not that of the records' ids"
    if deep and header.tools_sha256 != whole.tools_sha256:
        yield "tools_sha256 is not that of the tools that records offer"
