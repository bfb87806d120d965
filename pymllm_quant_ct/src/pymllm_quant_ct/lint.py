"""What is known to be trouble in compressed-tensors checkpoints, from config and headers alone.

Each finding is a thing that users of the format ran into; the sources are named where they are looked for.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from pymllm_core.errors import CheckpointError
from pymllm_core.protocols.lint import Finding, LintInput, StoredTensor
from pymllm_quant_ct.config import EXTRAS, ROOT, Config, check_extras, read_config, unwrap
from pymllm_quant_ct.lint_modules import Module, config_findings
from pymllm_quant_ct.match import Matcher

_ROUTER = re.compile(r"(.*\.)?(mlp|block_sparse_moe)\.gate")
_KV_SCALE = re.compile(r".*\.(k_scale|v_scale|[kv]_proj\.output_scale)")
_WHOLE = "take the whole checkpoint, or write it again"
_FUSED_EXPERTS = re.compile(r".*\.experts\.(gate_up|down)_proj_(packed|scale|shape|zero_point)")


def lint(given: LintInput) -> Iterator[Finding]:
    """The `protocols.lint.QuantLint` of this format."""
    modules = _modules(given.tensors, given.modules)
    if given.quantization is None:
        yield from _unnamed(modules)
        return
    yield from _by_names(modules, given.tensors)
    config, refused = _read(unwrap(given.quantization))
    for message in dict.fromkeys(refused):
        yield Finding("error", "config-refused", (message.partition(" ")[0],), message)
    if config is None:
        return
    try:
        matcher = Matcher(config)
    except CheckpointError as error:
        yield Finding("error", "config-refused", (str(error).partition(" ")[0],), str(error))
        return
    yield from config_findings(matcher, modules, given.modules)


def _modules(tensors: Mapping[str, StoredTensor], known: Mapping[str, str]) -> dict[str, Module]:
    """What is stored, by module. The class of one that no graph names is guessed from its name."""
    stored: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        stored[module][kind] = tensor
    return {
        name: Module(name, known.get(name) or ("Embedding" if "embed" in name else "Linear"), kinds)
        for name, kinds in stored.items()
    }


def _read(config: Mapping[str, Any]) -> tuple[Config | None, list[str]]:
    """The config without what is refused beside its groups, and every refusal, not only the first."""
    rest, refused = dict(config), []
    for name in EXTRAS:
        try:
            check_extras({name: rest.get(name)})
        except CheckpointError as error:
            refused.append(str(error))
            rest.pop(name)
    try:
        return read_config(rest), refused
    except CheckpointError as error:
        refused.append(str(error))
    groups = rest.get("config_groups")
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        try:
            read_config({**rest, "config_groups": {name: group}})
        except CheckpointError as error:
            refused.append(str(error))
    return None, refused


def _unnamed(modules: Mapping[str, Module]) -> Iterator[Finding]:
    names = tuple(name for name, module in modules.items() if module.quantised)
    if names:
        message = f"stored quantised (weight_packed, weight_scale), but config.json has no {ROOT}"
        advice = "take config.json from the quantised checkpoint, not from the model it was made of"
        yield Finding("error", "no-quantization-config", names, message, advice)


def _by_names(modules: Mapping[str, Module], tensors: Mapping[str, StoredTensor]) -> Iterator[Finding]:
    """What names alone tell, whatever the architecture and even where the config is refused."""
    quantised = {name: module for name, module in modules.items() if module.quantised}
    # compressed-tensors#733: with transformers 5 routers slipped through `ignore`.
    if routers := tuple(name for name in quantised if _ROUTER.fullmatch(name)):
        message = "the router, which chooses the experts, is quantised; quantisers do that by mistake"
        advice = "quantise again with the routers in `ignore` (re:.*mlp.gate$)"
        yield Finding("warning", "router-quantised", routers, message, advice)
    # llm-compressor#2939
    if fused := tuple(name for name in tensors if _FUSED_EXPERTS.fullmatch(name)):
        message = (
            "experts are quantised as one fused tensor; those that llm-compressor 0.12.0 wrote are corrupt"
        )
        yield Finding("warning", "fused-experts", fused, message, "quantise again with another version")
    if scales := tuple(name for name in tensors if _KV_SCALE.fullmatch(name)):
        message = (
            "scales of a quantised KV cache, which is not implemented; loading refuses what nothing reads"
        )
        advice = "take a checkpoint without kv_cache_scheme, or remove these tensors and the scheme"
        yield Finding("error", "kv-cache-scales", scales, message, advice)
    for module in quantised.values():
        kinds = module.stored
        if not kinds.keys() & {"weight_packed", "weight"}:
            message = f"{', '.join(sorted(kinds))}: stored, but the weight that they belong to is not"
            yield Finding("error", "scale-without-weight", (module.name,), message, _WHOLE)
        elif "weight_scale" not in kinds:
            message = "packed codes are stored without weight_scale"
            yield Finding(
                "error", "weight-without-scale", (module.name,), message, "take the whole checkpoint"
            )
