"""One pass over the selections of expert-parallel steps: rows per expert, ranks that each token reaches, busiest ports.

A token's ranks are a set of bits, 64 to a word. Tokens per receiving rank are summed over such words by carry-save
adders (as in Mula, Kurz, Lemire, "Faster population counts using AVX2 instructions", Computer Journal 61(1), 2018),
which costs a fraction of one increment per token and rank.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

PLANES = 32  # bits of a count of tokens
GROUP = 16  # tokens added together
NODE, CLUSTER, SCOPES = 0, 1, 2
EGRESS, INGRESS, PAIR = 0, 1, 2
GOLDEN = (5**0.5 - 1) / 2  # the step of `placement.metrics.slot_of_token` through the shares


class Choice(NamedTuple):
    """Which slot computes each use of an expert, and where it is; entry 0 of an expert axis is padding.

    ``first`` uint32[layer, 1 + expert]; ``after`` uint32[layer, slot + 1], the next replica of a slot's expert (the
    last slot is none); ``upto`` float64[layer, 1 + expert, replica], cumulated shares (empty: an even split, in
    turn); ``replicas`` uint32[layer, 1 + expert, replica]; ``copies`` int64[layer, 1 + expert]; ``word``
    uint32[slot + 1] and ``bit`` uint64[slot + 1]: the rank's place in a set.
    """

    first: np.ndarray
    after: np.ndarray
    upto: np.ndarray
    replicas: np.ndarray
    copies: np.ndarray
    word: np.ndarray
    bit: np.ndarray


class Ports(NamedTuple):
    """``reach`` uint64[scope, word, home rank], the ranks that a home reaches over each scope; ``own`` uint64[word,
    rank], a rank's own bit; ``port`` uint32[scope, rank]; ``node`` int64[rank]; ``used`` bool[scope]; ``pairs``: count
    port pairs too; ``keep``: keep who sends what."""

    reach: np.ndarray
    own: np.ndarray
    port: np.ndarray
    node: np.ndarray
    used: np.ndarray
    pairs: bool
    keep: bool


class Loads(NamedTuple):
    """What is found, by step and layer: ``tokens``, ``groups``, ``largest`` int32[step, layer, rank]; ``wires``
    int64[step, layer, scope, 3]; ``moved`` int64[step, layer, scope]; ``stayed`` int64[step, layer]; ``sent``
    int32[step, layer, rank, rank] (empty unless kept)."""

    tokens: np.ndarray
    groups: np.ndarray
    largest: np.ndarray
    wires: np.ndarray
    moved: np.ndarray
    stayed: np.ndarray
    sent: np.ndarray


class Scratch(NamedTuple):
    """Of one layer of one step: ``cursor`` uint32, ``uses`` int32 and ``table`` uint64[1 + expert]; ``rows``
    int32[slot + 1]; ``masks`` uint64[word, token]; ``planes`` uint64[32]; ``into`` int64[64]; ``ports`` int64[2, port];
    ``sent`` int32[rank, rank]; ``between`` int64[scope, port, port]."""

    cursor: np.ndarray
    uses: np.ndarray
    table: np.ndarray
    rows: np.ndarray
    masks: np.ndarray
    planes: np.ndarray
    into: np.ndarray
    ports: np.ndarray
    sent: np.ndarray
    between: np.ndarray


@numba.njit(cache=True, nogil=True, inline="always")
def popcount(word: np.uint64) -> int:
    """Return the number of bits that are set (Hacker's Delight, section 5-1)."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))  # type: ignore[return-value]


@numba.njit(cache=True, nogil=True)
def _one_copy(ids: np.ndarray, choice: Choice, layer: int, scratch: Scratch) -> None:
    """Fill masks and rows of a layer, int16[token, k]; every expert has one slot, and ranks fit one word."""
    first, table, uses, masks = choice.first[layer], scratch.table, scratch.uses, scratch.masks[0]
    for expert in range(len(first)):
        table[expert], uses[expert] = choice.bit[first[expert]], 0
    for token in range(len(ids)):
        row, mask = ids[token], np.uint64(0)
        for place in range(len(row)):
            entry = np.uint64(row[place] + 1)  # unsigned: an index that needs no check
            uses[entry] += 1
            mask |= table[entry]
        masks[token] = mask
    for expert in range(len(first)):
        scratch.rows[first[expert]] = uses[expert]


@numba.njit(cache=True, nogil=True)
def _in_turn(ids: np.ndarray, choice: Choice, layer: int, scratch: Scratch) -> None:
    """Fill masks and rows of a layer, int16[token, k]; replicas take turns, and ranks fit one word."""
    cursor, after, rows, bit, masks = scratch.cursor, choice.after[layer], scratch.rows, choice.bit, scratch.masks[0]
    first = choice.first[layer]
    for expert in range(len(first)):
        cursor[expert] = first[expert]
    for token in range(len(ids)):
        row, mask = ids[token], np.uint64(0)
        for place in range(len(row)):
            entry = np.uint64(row[place] + 1)
            slot = cursor[entry]
            cursor[entry] = after[slot]
            rows[slot] += 1
            mask |= bit[slot]
        masks[token] = mask


@numba.njit(cache=True, nogil=True, inline="always")
def _shared_slot(choice: Choice, layer: int, expert: np.uint64, turn: int) -> np.uint32:
    """Return the slot of an expert's use `turn` under stated shares; as `slot_of_token`."""
    copies = choice.copies[layer, expert]
    if copies <= 1:
        return choice.first[layer, expert]
    upto = choice.upto[layer, expert]
    angle = (turn + 1) * GOLDEN
    point, place = (angle - np.floor(angle)) * upto[-1], 0
    while place < copies - 1 and upto[place] <= point:
        place += 1
    return choice.replicas[layer, expert, place]


@numba.njit(cache=True, nogil=True)
def _any(ids: np.ndarray, choice: Choice, layer: int, scratch: Scratch) -> None:
    """Fill masks and rows of a layer, int16[token, k]; stated shares or turns, any number of ranks."""
    cursor, uses, first = scratch.cursor, scratch.uses, choice.first[layer]
    for expert in range(len(first)):
        cursor[expert], uses[expert] = first[expert], 0
    scratch.masks[:] = 0
    for token in range(len(ids)):
        row = ids[token]
        for place in range(len(row)):
            entry = np.uint64(row[place] + 1)
            slot = cursor[entry]
            if choice.upto.size:
                slot = _shared_slot(choice, layer, entry, uses[entry])
            cursor[entry] = choice.after[layer, slot]
            uses[entry] += 1
            scratch.rows[slot] += 1
            scratch.masks[choice.word[slot], token] |= choice.bit[slot]


@numba.njit(cache=True, nogil=True)
def _ranks(count: np.ndarray, loads: Loads, step: int, layer: int) -> None:
    """Sum the slots of each rank: rows, distinct experts' copies in use, the fullest."""
    num_ranks = loads.tokens.shape[2]
    width = (len(count) - 1) // num_ranks
    for rank in range(num_ranks):
        rows, groups, largest = 0, 0, 0
        for slot in range(rank * width, (rank + 1) * width):
            rows += count[slot]
            groups += count[slot] > 0
            largest = max(largest, count[slot])
        loads.tokens[step, layer, rank] = rows
        loads.groups[step, layer, rank] = groups
        loads.largest[step, layer, rank] = largest


@numba.njit(cache=True, nogil=True, inline="always")
def _ripple(planes: np.ndarray, word: np.uint64, plane: int) -> None:
    """Add bits of weight ``2 ** plane`` to the counts."""
    while word:
        held = planes[plane]
        planes[plane] = held ^ word
        word &= held
        plane += 1


@numba.njit(cache=True, nogil=True, inline="always")
def _add(a: np.uint64, b: np.uint64, c: np.uint64) -> tuple[np.uint64, np.uint64]:
    """Add three bits in every place; return carries and sums."""
    either = b ^ c  # `a` is a running sum: it comes last, so that sums wait for each other as little as can be
    return (b & c) | (a & either), a ^ either


@numba.njit(cache=True, nogil=True, inline="always")
def _add_four(masks: np.ndarray, reach: np.ndarray, home: np.ndarray, token: int, ones: np.uint64,
              twos: np.uint64) -> tuple[np.uint64, np.uint64, np.uint64]:
    """Add the sets of four tokens to running sums; return carries of weight four, and the sums."""
    a, b = masks[token] & reach[home[token]], masks[token + 1] & reach[home[token + 1]]
    c, d = masks[token + 2] & reach[home[token + 2]], masks[token + 3] & reach[home[token + 3]]
    carry, ones = _add(ones, a, b)
    other, ones = _add(ones, c, d)
    fours, twos = _add(twos, carry, other)
    return fours, ones, twos


@numba.njit(cache=True, nogil=True)
def _receive(masks: np.ndarray, reach: np.ndarray, home: np.ndarray, planes: np.ndarray, into: np.ndarray) -> None:
    """Fill ``into`` int64[64 ranks], the tokens that reach each over one scope.

    `home` is of whole groups of `GROUP`; the sets beyond the last token are empty.
    """
    for plane in range(len(planes)):
        planes[plane] = 0
    for rank in range(len(into)):
        into[rank] = 0
    ones, twos, fours, eights = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
    for token in range(0, len(home), GROUP):
        first, ones, twos = _add_four(masks, reach, home, token, ones, twos)
        second, ones, twos = _add_four(masks, reach, home, token + 4, ones, twos)
        eight, fours = _add(fours, first, second)
        first, ones, twos = _add_four(masks, reach, home, token + 8, ones, twos)
        second, ones, twos = _add_four(masks, reach, home, token + 12, ones, twos)
        other, fours = _add(fours, first, second)
        sixteen, eights = _add(eights, eight, other)
        _ripple(planes, sixteen, 4)
    planes[0], planes[1], planes[2], planes[3] = ones, twos, fours, eights
    for plane in range(len(planes)):
        if planes[plane]:
            for rank in range(64):
                into[rank] += np.int64((planes[plane] >> np.uint64(rank)) & np.uint64(1)) << plane


@numba.njit(cache=True, nogil=True)
def _leave(home: np.ndarray, net: Ports, loads: Loads, scratch: Scratch, step: int, layer: int) -> None:
    """Tokens that every port sends over each scope, and those that stay with their rank."""
    near, far = scratch.ports[NODE], scratch.ports[CLUSTER]
    for place in range(len(near)):
        near[place], far[place] = 0, 0
    stayed = 0
    for word in range(len(scratch.masks)):
        masks, own = scratch.masks[word], net.own[word]
        reach, beyond = net.reach[NODE, word], net.reach[CLUSTER, word]
        for token in range(len(home)):
            mask, rank = masks[token], home[token]
            near[net.port[NODE, rank]] += popcount(mask & reach[rank])
            far[net.port[CLUSTER, rank]] += popcount(mask & beyond[rank])
            stayed += (mask & own[rank]) != 0
    loads.stayed[step, layer] = stayed
    for scope in range(SCOPES):
        most, moved = 0, 0
        for tokens in scratch.ports[scope]:
            most, moved = max(most, tokens), moved + tokens
        loads.wires[step, layer, scope, EGRESS] = most
        loads.moved[step, layer, scope] = moved


@numba.njit(cache=True, nogil=True)
def _arrive(scope: int, home: np.ndarray, net: Ports, loads: Loads, scratch: Scratch, step: int, layer: int) -> None:
    """The most tokens that a port receives over a scope."""
    received, into, port = scratch.ports[0], scratch.into, net.port[scope]
    for place in range(len(received)):
        received[place] = 0
    for word in range(len(scratch.masks)):
        _receive(scratch.masks[word], net.reach[scope, word], home, scratch.planes, into)
        for rank in range(word * 64, min(len(port), (word + 1) * 64)):
            received[port[rank]] += into[rank - word * 64]
    most = 0
    for tokens in received:
        most = max(most, tokens)
    loads.wires[step, layer, scope, INGRESS] = most


@numba.njit(cache=True, nogil=True)
def _send(home: np.ndarray, masks: np.ndarray, sent: np.ndarray) -> None:
    """Fill who sends how many tokens to whom."""
    sent[:] = 0
    for word in range(len(masks)):
        for token in range(len(home)):
            mask, row = masks[word, token], sent[home[token], word * 64:(word + 1) * 64]
            for place in range(len(row)):
                row[place] += np.int32((mask >> np.uint64(place)) & np.uint64(1))


@numba.njit(cache=True, nogil=True)
def _pairs(net: Ports, loads: Loads, sent: np.ndarray, between: np.ndarray, step: int, layer: int) -> None:
    """The most tokens between an ordered pair of ports of each scope."""
    between[:] = 0
    most = loads.wires[step, layer]
    for source in range(len(sent)):
        for target in range(len(sent)):
            if source != target and sent[source, target]:
                scope = NODE if net.node[source] == net.node[target] else CLUSTER
                one, other = net.port[scope, source], net.port[scope, target]
                between[scope, one, other] += sent[source, target]
                most[scope, PAIR] = max(most[scope, PAIR], between[scope, one, other])


@numba.njit(cache=True, nogil=True)
def _layer(ids: np.ndarray, home: np.ndarray, choice: Choice, net: Ports, loads: Loads, scratch: Scratch, step: int,
           layer: int) -> None:
    for slot in range(len(scratch.rows)):
        scratch.rows[slot] = 0
    if choice.upto.size or len(scratch.masks) > 1:
        _any(ids, choice, layer, scratch)
    elif choice.after.shape[1] == choice.first.shape[1]:
        _one_copy(ids, choice, layer, scratch)
    else:
        _in_turn(ids, choice, layer, scratch)
    _ranks(scratch.rows, loads, step, layer)
    _leave(home, net, loads, scratch, step, layer)
    for scope in range(SCOPES):
        if net.used[scope]:
            _arrive(scope, home, net, loads, scratch, step, layer)
    if net.keep:
        _send(home, scratch.masks, loads.sent[step, layer])
        if net.pairs:
            _pairs(net, loads, loads.sent[step, layer], scratch.between, step, layer)
    elif net.pairs:
        _send(home, scratch.masks, scratch.sent)
        _pairs(net, loads, scratch.sent, scratch.between, step, layer)


@numba.njit(cache=True, nogil=True)
def reduce_steps(ids: np.ndarray, home: np.ndarray, starts: np.ndarray, choice: Choice, net: Ports, loads: Loads,
                 scratch: Scratch, first: int) -> None:
    """Fill steps ``first ...`` of the loads.

    Args:
        ids: int16[layer, token, k], -1 pads.
        home: uint32[token]; starts: int64[step + 1], where the tokens of each step begin.
    """
    homes = np.zeros(scratch.masks.shape[1], np.uint32)
    for step in range(len(starts) - 1):
        begin, end = starts[step], starts[step + 1]
        scratch.masks[:] = 0
        padded = homes[:(end - begin + GROUP - 1) // GROUP * GROUP]
        for token in range(len(padded)):
            padded[token] = home[begin + token] if begin + token < end else 0
        for layer in range(len(ids)):
            _layer(ids[layer, begin:end], padded, choice, net, loads, scratch, first + step, layer)


@numba.njit(cache=True, nogil=True)
def count_ranks(home: np.ndarray, position: np.ndarray, requests: np.ndarray, starts: np.ndarray, tokens: np.ndarray,
                context: np.ndarray, heads: np.ndarray, held: np.ndarray, stamp: np.ndarray) -> None:
    """Fill rows, cached tokens that they attend to, and last rows of requests: int64[step, home rank].

    Args:
        home: uint32[token]; position, requests: int64[token]; starts: int64[step + 1].
        held, stamp: int64[cell], a hash table of requests; a power of two, more than the rows of any step.
    """
    size = len(held)
    for cell in range(size):
        stamp[cell] = -1
    for step in range(len(starts) - 1):
        for token in range(starts[step + 1] - 1, starts[step] - 1, -1):  # from the end: first seen is last
            rank, request = home[token], requests[token]
            tokens[step, rank] += 1
            context[step, rank] += position[token] + 1
            cell = request & (size - 1)
            while stamp[cell] == step and held[cell] != request:
                cell = (cell + 1) & (size - 1)
            if stamp[cell] != step:
                stamp[cell], held[cell] = step, request
                heads[step, rank] += 1
