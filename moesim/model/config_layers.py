"""Which layers of a config are MoE layers, how many there are, and how wide the shared experts are.

Every function here is one family's habit; `families.py` says who has which.
"""

from __future__ import annotations

from collections.abc import Callable

from moesim.model.config_keys import LAYER_KEYS, SHARED_COUNT_KEYS, ConfigReader

Stack = tuple[int, int]


def decoder_only(reader: ConfigReader) -> Stack:
    """Return (layers, of which encoder layers)."""
    return reader.whole(*LAYER_KEYS), 0


def longcat_stack(reader: ConfigReader) -> Stack:
    """LongCat-Flash saves twice its layers as num_hidden_layers, for each has two attentions."""
    return reader.whole("num_layers"), 0


def nemotron_stack(reader: ConfigReader) -> Stack:
    """Nemotron-H: as many layers as its pattern has blocks (transformers 5 saves no other number)."""
    pattern = reader.config.get("layers_block_type") or reader.config.get("hybrid_override_pattern") or ()
    return reader.whole(*LAYER_KEYS, default=len(pattern) or None), 0


def switch_stack(reader: ConfigReader) -> Stack:
    """Encoder layers stand before decoder layers."""
    encoder = reader.whole("num_layers", "num_hidden_layers")
    return encoder + reader.whole("num_decoder_layers", default=encoder), encoder


def nllb_stack(reader: ConfigReader) -> Stack:
    """Encoder layers stand before decoder layers."""
    encoder = reader.whole("encoder_layers", "num_hidden_layers")
    return encoder + reader.whole("decoder_layers"), encoder


def every_layer(reader: ConfigReader, stack: Stack) -> list[int]:
    """Every layer is MoE."""
    return list(range(stack[0]))


def sparse_step(reader: ConfigReader, stack: Stack) -> list[int]:
    """Qwen: every step-th layer that is not listed as dense."""
    step = reader.whole("decoder_sparse_step", default=1)
    dense = reader.layer_ids("mlp_only_layers", stack[0])
    return [i for i in range(stack[0]) if i not in dense and (i + 1) % step == 0]


def layer_freq(reader: ConfigReader, stack: Stack) -> list[int]:
    """DeepSeek's moe_layer_freq: a step, or 0 or 1 for each layer."""
    if isinstance(reader.config.get("moe_layer_freq"), list):
        flags = reader.flags("moe_layer_freq", stack[0])
        return [i for i in range(stack[0]) if flags[i]]
    return list(range(0, stack[0], reader.whole("moe_layer_freq", default=1)))


def first_dense(reader: ConfigReader, stack: Stack) -> list[int]:
    """DeepSeek: the first layers are dense."""
    first = reader.whole("first_k_dense_replace", minimum=0)
    return [i for i in layer_freq(reader, stack) if i >= first]


def interleaved(reader: ConfigReader, stack: Stack) -> list[int]:
    """Llama-4: listed, or every step-th layer."""
    listed = reader.layer_ids("moe_layers", stack[0])
    step = reader.whole("interleave_moe_layer_step", default=0 if listed else None)
    return sorted(listed) or list(range(step - 1, stack[0], step))


def period_offset(reader: ConfigReader, stack: Stack) -> list[int]:
    """Jamba: one layer in each period."""
    period, offset = reader.whole("expert_layer_period"), reader.whole("expert_layer_offset", minimum=0)
    return [i for i in range(stack[0]) if i % period == offset]


def from_start(reader: ConfigReader, stack: Stack) -> list[int]:
    """ERNIE 4.5: every interval-th layer from a first to a last one."""
    first = reader.whole("moe_layer_start_index", default=1, minimum=0)
    last = reader.whole("moe_layer_end_index", default=-1, minimum=-1)
    step = reader.whole("moe_layer_interval", default=1)
    last = stack[0] - 1 if last == -1 else last
    return [i for i in range(first, min(last + 1, stack[0])) if (i + 1) % step == 0]


def both_stacks(encoder_step: str, decoder_step: str, remainder: int) -> Callable[[ConfigReader, Stack], list[int]]:
    """Return the rule of an encoder-decoder: in each stack one layer in a step of its own."""
    def layers(reader: ConfigReader, stack: Stack) -> list[int]:
        found = []
        for first, last, key in ((0, stack[1], encoder_step), (stack[1], stack[0], decoder_step)):
            step = reader.whole(key)
            found += [i for i in range(first, last) if (i - first) % step == remainder % step]
        return found
    return layers


PATTERN = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}


def block_kinds(reader: ConfigReader, num_layers: int) -> list[str]:
    """Return what each block of a Nemotron-H is: mamba, attention, moe or mlp, one after another."""
    kinds = reader.config.get("layers_block_type")
    if kinds is None:
        pattern = reader.config.get("hybrid_override_pattern")
        kinds = [PATTERN.get(letter) for letter in pattern] if isinstance(pattern, str) else None
    if not isinstance(kinds, list) or len(kinds) != num_layers or not set(kinds) <= {*PATTERN.values(), "mamba", "attention"}:
        raise reader.error(f"hybrid_override_pattern must say M, *, E or - for each of {num_layers} layers")
    renamed = {"mamba": "linear_attention", "attention": "full_attention"}
    return [renamed.get(kind, kind) for kind in kinds]


def pattern_blocks(reader: ConfigReader, stack: Stack) -> list[int]:
    """Nemotron-H: the blocks that are MoE."""
    return [i for i, kind in enumerate(block_kinds(reader, stack[0])) if kind == "moe"]


def no_shared(reader: ConfigReader, width: int) -> int:
    """No shared expert."""
    return 0


def shared_count(reader: ConfigReader, width: int) -> int:
    """So many shared experts as wide as a routed one."""
    return width * reader.whole(*SHARED_COUNT_KEYS, default=0, minimum=0)


def shared_width(reader: ConfigReader, width: int) -> int:
    """A width of its own."""
    return reader.whole("shared_expert_intermediate_size", default=0, minimum=0)


def shared_nemotron(reader: ConfigReader, width: int) -> int:
    """So many shared experts of a width of their own."""
    return reader.whole("moe_shared_expert_intermediate_size") * reader.whole("n_shared_experts", default=1, minimum=0)


def one_shared(reader: ConfigReader, width: int) -> int:
    """Always one shared expert."""
    return width
