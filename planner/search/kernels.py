"""The compiled inner loops: what a decision costs, and Metropolis steps over decisions.

One file, because a change of a file renews the compiled cache of that file alone; `metropolis` is the only way into
it for the search, because every entry is compiled apart. Everything here works on `Tables`, the arrays of a
`SearchProblem`; its meaning is that of `planner.search.schedule`.

A period is a list of *nodes*: node c < n is call c, node n + c the move before call c. Starts of period p follow from
ends of the same period and of earlier ones by maxima and sums only, so ends grow by a constant in the long run.
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import numpy as np

from planner.search.arrays import Scratch, Tables
from planner.search.compiled import compiled
from planner.search.problem import FloatArray, IntArray

WINDOW = 60  # periods: divisible by the length of every short cycle, so that the growth over it is never too small
PERIODS = 2 * WINDOW
LATENCY_WEIGHT = 1e-3
MEMORY_PENALTY = 4.0

FIRST, EXTENT, MESH, LAYOUT, COLUMN = range(5)  # columns of Tables.option
TIME, RESIDENT, TRANSIENT, SHARED = range(4)  # of Tables.price
OFFSET, COUNT, TRAINER, ROW_OFFSET, EDGES, EDGES_END, LEADER, VERSION = range(8)  # of Tables.call
SOURCE, TARGET, DISTANCE = range(3)  # of Tables.edge
BY_MESH, BY_LAYOUT = range(2)  # of Tables.ranked and Tables.starts
CHOICE, ORDER, LAG = range(3)  # rows of a decision
SEQUENCE, POSITION, COVER, MEMBER, WAITS = range(5)  # rows of Scratch.node
PRESENT, BEST, PERIOD, LATENCY, OVERFLOW = range(5)  # columns of costs


@compiled
def mesh_of(t: Tables, x: IntArray, c: int) -> int:
    """Mesh id of call c."""
    return t.option[t.call[c, OFFSET] + x[CHOICE, c], MESH]


@compiled
def is_legal(t: Tables, x: IntArray, s: Scratch) -> bool:
    """Whether every dependency comes first in the sequence of periods, and calls share meshes as they must; fills
    POSITION."""
    for k in range(x.shape[1]):
        s.node[POSITION, x[ORDER, k]] = k
        if mesh_of(t, x, k) != mesh_of(t, x, t.call[k, LEADER]):
            return False
    for e in range(t.edge.shape[0]):
        u, v = t.edge[e, SOURCE], t.edge[e, TARGET]
        ahead = x[LAG, v] + t.edge[e, DISTANCE] - x[LAG, u]
        if u != v and (ahead < 0 or (ahead == 0 and s.node[POSITION, u] >= s.node[POSITION, v])):
            return False
    for e in range(t.turn.shape[0]):
        u, v = t.turn[e, SOURCE], t.turn[e, TARGET]
        ahead = x[LAG, v] + t.turn[e, DISTANCE] - x[LAG, u]
        if ahead < 0 or (ahead == 0 and s.node[POSITION, u] >= s.node[POSITION, v]):
            return False
    return True


@compiled
def memory_overflow(t: Tables, x: IntArray) -> float:
    """Bytes above capacity, summed over the first GPU of every mesh (where the fullest GPUs are)."""
    overflow = 0.0
    for a in range(x.shape[1]):
        gpu = t.option[t.call[a, OFFSET] + x[CHOICE, a], FIRST]
        resident, largest = 0.0, 0.0
        for b in range(x.shape[1]):
            row = t.call[b, OFFSET] + x[CHOICE, b]
            if t.option[row, FIRST] <= gpu < t.option[row, FIRST] + t.option[row, EXTENT]:
                transient, u = t.price[row, TRANSIENT], t.call[b, TRAINER]
                if u >= 0:
                    home = t.call[u, OFFSET] + x[CHOICE, u]
                    if t.option[home, MESH] == t.option[row, MESH] and t.option[home, LAYOUT] == t.option[row, LAYOUT]:
                        transient -= t.price[row, SHARED]
                resident += t.price[row, RESIDENT]
                largest = max(largest, transient)
        overflow += max(0.0, resident + largest - t.capacity)
    return overflow


@compiled
def move_seconds(t: Tables, x: IntArray, c: int) -> float:
    """Seconds of the reallocation before call c."""
    u = t.call[c, TRAINER]
    if u < 0:
        return 0.0
    row = t.move_row[t.call[c, ROW_OFFSET] + x[CHOICE, u]]
    return t.moves[row + t.option[t.call[c, OFFSET] + x[CHOICE, c], COLUMN]]


@compiled
def has_copy(t: Tables, x: IntArray, k: int) -> bool:
    """Whether a call that comes before number k of the order has made the copy that it reads."""
    c = x[ORDER, k]
    row = t.call[c, OFFSET] + x[CHOICE, c]
    for j in range(k):
        b = x[ORDER, j]
        other = t.call[b, OFFSET] + x[CHOICE, b]
        if (
            t.call[b, TRAINER] == t.call[c, TRAINER]
            and t.call[b, VERSION] == t.call[c, VERSION]
            and x[LAG, b] == x[LAG, c]
            and t.option[other, MESH] == t.option[row, MESH]
            and t.option[other, LAYOUT] == t.option[row, LAYOUT]
        ):
            return True
    return False


@compiled
def list_nodes(t: Tables, x: IntArray, s: Scratch) -> int:
    """Fill SEQUENCE, COVER, MEMBER and duration; returns the number of nodes."""
    n = x.shape[1]
    for a in range(n):
        row, bits = t.call[a, OFFSET] + x[CHOICE, a], 0
        first, end = t.option[row, FIRST], t.option[row, FIRST] + t.option[row, EXTENT]
        for b in range(n):
            other = t.call[b, OFFSET] + x[CHOICE, b]
            if first < t.option[other, FIRST] + t.option[other, EXTENT] and t.option[other, FIRST] < end:
                bits |= 1 << b
        s.node[COVER, a], s.node[MEMBER, a], s.duration[a] = bits, 1 << a, t.price[row, TIME]
    count = 0
    for k in range(n):
        c = x[ORDER, k]
        seconds = move_seconds(t, x, c)
        if seconds > 0.0 and not has_copy(t, x, k):
            u, node = t.call[c, TRAINER], n + c
            s.duration[node] = seconds
            s.node[COVER, node] = s.node[COVER, u] | s.node[COVER, c]
            s.node[MEMBER, node] = s.node[MEMBER, u] | s.node[MEMBER, c]
            s.node[SEQUENCE, count] = node
            count += 1
        s.node[SEQUENCE, count] = c
        count += 1
    return count


@compiled
def add_wait(s: Scratch, node: int, before: int, back: int) -> None:
    """Let `node` wait for the node `before` of `back` periods earlier."""
    k = s.node[WAITS, node]
    s.wait[node, k, 0], s.wait[node, k, 1] = before, back
    s.node[WAITS, node] = k + 1


@compiled
def link_nodes(t: Tables, x: IntArray, s: Scratch, count: int) -> int:
    """Fill what each node waits for: shared GPUs and dependencies; returns the deepest look back in periods.

    Of the nodes on the same GPUs only those count that no later one of them has waited for itself.
    """
    for k in range(count):
        node, met = s.node[SEQUENCE, k], 0
        s.node[WAITS, node] = 0
        for step in range(1, count + 1):
            other = s.node[SEQUENCE, (k - step) % count]
            if s.node[COVER, node] & s.node[MEMBER, other] and not met & s.node[MEMBER, other]:
                add_wait(s, node, other, 0 if step <= k else 1)
                met |= s.node[COVER, other]
    deepest = 1
    for e in range(t.edge.shape[0]):
        u, v = t.edge[e, SOURCE], t.edge[e, TARGET]
        if not s.node[COVER, v] & (1 << u):
            back = x[LAG, v] + t.edge[e, DISTANCE] - x[LAG, u]
            add_wait(s, v, u, back)
            deepest = max(deepest, back)
    return deepest


@compiled
def grown_by(s: Scratch, count: int, row: int, span: int, growth: float) -> bool:
    """Whether every end grew by `growth` between the rows `row - span` and `row`."""
    slack = 1e-9 * s.ends[row, s.node[SEQUENCE, 0]]
    for k in range(count):
        node = s.node[SEQUENCE, k]
        if abs(s.ends[row, node] - s.ends[row - span, node] - growth) > slack:
            return False
    return True


@compiled
def play_period(s: Scratch, count: int, row: int) -> None:
    """Ends of one period from those of the earlier rows."""
    for k in range(count):
        node = s.node[SEQUENCE, k]
        start = 0.0
        for j in range(s.node[WAITS, node]):
            start = max(start, s.ends[row - s.wait[node, j, 1], s.wait[node, j, 0]])
        s.ends[row, node] = start + s.duration[node]


@compiled
def steady_period(s: Scratch, count: int, deepest: int) -> float:
    """Seconds per period in the long run, from playing periods until they repeat: as many rows as are looked back at
    have all grown by the same amount, over one row or over two."""
    for row in range(deepest):
        for k in range(count):
            s.ends[row, s.node[SEQUENCE, k]] = -1e30
    by_one, by_two, last_one, last_two, some = 0, 0, 0.0, 0.0, s.node[SEQUENCE, 0]
    for row in range(deepest, deepest + PERIODS):
        play_period(s, count, row)
        if row > deepest:
            by_one = by_one + 1 if grown_by(s, count, row, 1, last_one) else 0
            last_one = s.ends[row, some] - s.ends[row - 1, some]
            if by_one >= deepest:
                return last_one
        if row > deepest + 1:
            by_two = by_two + 1 if grown_by(s, count, row, 2, last_two) else 0
            last_two = s.ends[row, some] - s.ends[row - 2, some]
            if by_two > deepest:
                return last_two / 2.0
    last, growth = deepest + PERIODS - 1, 0.0
    for k in range(count):
        node = s.node[SEQUENCE, k]
        growth = max(growth, s.ends[last, node] - s.ends[last - WINDOW, node])
    return growth / WINDOW


@compiled
def most_lag(t: Tables) -> int:
    """The largest lag of a decision, as `SearchProblem.most_lag`."""
    most = 1
    for e in range(t.turn.shape[0]):
        most = max(most, 1 - t.turn[e, DISTANCE])
    return most


@compiled
def lone_latency(t: Tables, x: IntArray, s: Scratch, count: int) -> float:
    """Seconds of one iteration with nothing before it and nothing beside it; uses the first row of `ends`."""
    n, latency = x.shape[1], 0.0
    for k in range(count):
        s.ends[0, s.node[SEQUENCE, k]] = 0.0
    for turn in range(1 + most_lag(t)):
        for k in range(count):
            node = s.node[SEQUENCE, k]
            if x[LAG, node % n] != turn:
                continue
            start = 0.0
            for j in range(count):
                other = s.node[SEQUENCE, j]
                if s.node[COVER, node] & s.node[MEMBER, other]:
                    start = max(start, s.ends[0, other])
            if node < n:
                for e in range(t.call[node, EDGES], t.call[node, EDGES_END]):
                    if t.edge[e, DISTANCE] == 0:
                        start = max(start, s.ends[0, t.edge[e, SOURCE]])
            s.ends[0, node] = start + s.duration[node]
            latency = max(latency, s.ends[0, node])
    return latency


@compiled
def measure(t: Tables, x: IntArray, s: Scratch, costs: FloatArray) -> float:
    """Objective of a legal decision, raised by memory above capacity; fills PERIOD, LATENCY and OVERFLOW."""
    costs[OVERFLOW] = memory_overflow(t, x)
    count = list_nodes(t, x, s)
    costs[PERIOD] = steady_period(s, count, link_nodes(t, x, s, count))
    costs[LATENCY] = lone_latency(t, x, s, count)
    cost = costs[PERIOD] + LATENCY_WEIGHT * costs[LATENCY]
    return cost * (1.0 + MEMORY_PENALTY * costs[OVERFLOW] / t.capacity)


@compiled
def draw(random: IntArray, bound: int) -> int:
    """A number in [0, bound) from a xorshift of 4 x 32 bits (Marsaglia 2003), alike in Python and compiled."""
    x = random[0] ^ ((random[0] << 11) & 0xFFFFFFFF)
    random[0], random[1], random[2] = random[1], random[2], random[3]
    random[3] = random[3] ^ (random[3] >> 19) ^ x ^ (x >> 8)
    return (random[3] * bound) >> 32


@compiled
def pick_option(t: Tables, random: IntArray, x: IntArray, c: int, like: int) -> int:
    """A new option for call c, on the mesh of call `like` unless that is -1; the faster ones of a group more often."""
    kind = draw(random, 10)
    by, row = BY_MESH, t.call[c, OFFSET] + x[CHOICE, c]  # 5, 6: another layout on the same mesh
    if like >= 0 or kind >= 7:  # the mesh of another call
        other = like if like >= 0 else draw(random, x.shape[1])
        row = t.call[other, OFFSET] + x[CHOICE, other]
    elif kind < 3:  # anywhere
        row = t.call[c, OFFSET] + draw(random, t.call[c, COUNT])
    elif kind < 5:  # the same layout elsewhere
        by = BY_LAYOUT
    group = t.option[row, MESH] if by == BY_MESH else t.option[row, LAYOUT]
    low, high = t.starts[by, c, group], t.starts[by, c, group + 1]
    if low == high:
        return draw(random, t.call[c, COUNT])
    return t.ranked[by, t.call[c, OFFSET] + low + draw(random, 1 + draw(random, high - low))]


@compiled
def reorder(random: IntArray, x: IntArray, c: int, most: int) -> None:
    """Put call c at a random place of the order and, half the time, give it another lag of up to `most`."""
    n, k = x.shape[1], 0
    while x[ORDER, k] != c:
        k += 1
    place = draw(random, n)
    step = 1 if place > k else -1
    while k != place:
        x[ORDER, k] = x[ORDER, k + step]
        k += step
    x[ORDER, place] = c
    if draw(random, 2) == 1:
        x[LAG, c] = (x[LAG, c] + 1 + (draw(random, most) if most > 1 else 0)) % (most + 1)


@compiled
def choose_anew(t: Tables, random: IntArray, x: IntArray, c: int, other: int, kind: int) -> None:
    """Change the option of call c and, of a kind below 30, that of call `other`; below 15 they exchange meshes."""
    trades = kind < 15
    picked = pick_option(t, random, x, c, other if trades else -1)
    if kind < 30:
        x[CHOICE, other] = pick_option(t, random, x, other, c if trades else -1)
    x[CHOICE, c] = picked
    for b in range(x.shape[1]):  # calls that must have its mesh follow
        if b != c and t.call[b, LEADER] == t.call[c, LEADER] and mesh_of(t, x, b) != mesh_of(t, x, c):
            x[CHOICE, b] = pick_option(t, random, x, b, c)


@compiled
def propose(t: Tables, random: IntArray, x: IntArray) -> None:
    """Change one option, or two (two calls may exchange meshes), or a call's place in the order and its lag."""
    c, other = draw(random, x.shape[1]), draw(random, x.shape[1])
    kind = draw(random, 100)
    if kind >= 75:
        reorder(random, x, c, most_lag(t))
    if kind < 80:
        choose_anew(t, random, x, c, other, kind)


@compiled
def copy_decision(source: IntArray, target: IntArray) -> None:  # compiles faster than a slice
    for k in range(3):
        for c in range(source.shape[1]):
            target[k, c] = source[k, c]


@compiled
def accepts(random: IntArray, rise: float, temperature_s: float) -> bool:
    """Whether a step that raises the cost by `rise` is taken (Metropolis et al. 1953)."""
    return rise <= 0.0 or draw(random, 1 << 30) < np.exp(-rise / temperature_s) * (1 << 30)


@compiled
def metropolis(
    t: Tables, s: Scratch, now: IntArray, best: IntArray, random: IntArray, costs: FloatArray,
    temperature_s: float, steps: int,
) -> None:  # fmt: skip
    """`steps` Metropolis-Hastings steps of one chain, in place.

    now, best [3, n]: choice, order, lag. costs [5]: PRESENT of `now` (a NaN is measured first, an illegal decision
    stays NaN), BEST of the decisions that fit, and PERIOD, LATENCY and OVERFLOW of the decision measured last.
    """
    for step in range(-1 if np.isnan(costs[PRESENT]) else 0, steps):
        copy_decision(now, s.tried)
        if step >= 0:
            propose(t, random, s.tried)
        if not is_legal(t, s.tried, s):
            continue
        cost = measure(t, s.tried, s, costs)
        if step < 0 or accepts(random, cost - costs[PRESENT], temperature_s):
            costs[PRESENT] = cost
            copy_decision(s.tried, now)
            if costs[OVERFLOW] == 0.0 and cost < costs[BEST]:
                costs[BEST] = cost
                copy_decision(s.tried, best)
