"""What a GPU kernel does, from its name: the table that sorts a profile's time into shares. First match wins."""

from __future__ import annotations

import re
from pathlib import Path

from moesim.calibrate.imports.base import brief, parse_json, read_text
from moesim.errors import InputError

Patterns = list[tuple[str, re.Pattern[str]]]
UNMATCHED = "unmatched"

_DEFAULT = (
    ("dispatch and combine", r"\bep::(internode|intranode|internode_ll)::|deep_?ep|get_dispatch_layout|moe_a2a|moe_alltoall"),
    ("collectives", r"nccl(Dev)?Kernel|ncclKernel|rccl|(all_?reduce|all_?gather|reduce_?scatter|all_?to_?all)"),
    ("experts", r"fused_moe|grouped_gemm|GroupedGemm|m_grouped_|marlin_moe|moe_gemm|_grouped_mm|group_gemm"),
    ("routing", r"topk|top_k|moe_align|moe_sum|gating|expert_?(map|sort|count)|permute"),
    ("attention", r"flash|fmha|attention|attn|paged_kv|mla_|mha_"),
    ("matrix products", r"gemm|gemv|cutlass|cublas|xmma|_mm_|matmul|wgmma"),
    ("norm and elementwise", r"norm|elementwise|vectorized|activation|silu|swiglu|gelu|rope|rotary|softmax|reduce_kernel|copy_kernel|"
                             r"index|gather|scatter|cat|embedding|quant|triton_(poi|red|per)"),
)


def load_patterns(path: str | None) -> Patterns:
    """Return the user's patterns, then the built-in ones.

    Args:
        path: JSON, ``{"name of a share": ["regular expression", ...]}``.

    Raises:
        InputError: not such a file, or an expression that is not one.
    """
    own: Patterns = []
    if path is not None:
        document = parse_json(read_text(Path(path)), path)
        if not isinstance(document, dict):
            raise InputError(f"{path}: expected an object {{name: [regular expression, ...]}}, got {brief(document)}")
        for name, expressions in document.items():
            if not isinstance(expressions, list) or not all(isinstance(one, str) for one in expressions):
                raise InputError(f"{path}: {name!r} must be a list of regular expressions, got {brief(expressions)}")
            own += [(name, _compiled(one, f"{path}: {name!r}")) for one in expressions]
    return own + [(name, re.compile(expression, re.IGNORECASE)) for name, expression in _DEFAULT]


def share_of(name: str, patterns: Patterns) -> str:
    """Return the share that a kernel of this name belongs to."""
    return next((share for share, pattern in patterns if pattern.search(name)), UNMATCHED)


def _compiled(expression: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"{where}: {brief(expression)} is not a regular expression: {error}") from None
