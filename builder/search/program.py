"""The mixed-integer program that chooses one alternative per attention and FFN, and what is fused.

Variables, for a layer l: x[l,a] and y[l,f], one of each layer's alternatives (Puzzle, arXiv 2411.19146);
z[l], layer l's FFN is fused into the one before it. With `alone[l]` = an FFN is left, `gone[l]` = none is:

    before[l] <= x[l,none], alone[l] + before[l-1], alone[l] + gone[l]    a lone FFN ends at l or before it
    after[l]  <= x[l,none], alone[l] + after[l+1],  alone[l] + gone[l]    and one begins at l or after it
    z[l]      <= x[l,none], alone[l], before[l-1], after[l+1]             the last of a run is left alone
    width[l]  >= width[l-1] + y's width - (1 - z[l]) M, and <= the limit of one fused weight

    chain[l,k] >= chain[l,k-1] + z[l-k] + gone[l-k] - 1, chain[l,0] = z[l]  l is fused with l-k-1 as well

so layers with neither attention nor FFN lie inside a run and do not end it. Seconds are those of the parts,
less `saved` z[l], less refund[l] where FFNs have an excess (builder.search.curve): over a group

    sum of excess - sum of refund >= height - fall * sum of widths, for every piece of the curve

which credit[l], handed from one member to the next, says layer by layer. For convex costs, estimated ones
among them, the program's seconds are the true ones; for others they are never below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from builder.architecture import FFN, Architecture
from builder.search.alternatives import FFNPart, Option, Space
from builder.search.curve import Curve
from builder.search.latency import Costs
from builder.search.quiet import stdout_of_libraries_dropped
from builder.search.rows import Counter, Rows, Term, minus
from builder.surgery.fusion import Group

Quantity = Literal["seconds", "bytes", "kl"]
SCALE = 1e6  # the largest objective there can be; HiGHS stops within 1e-6 of the best
TIE = 1e-7  # weight of the second objective
STATUS_TIME = 1  # of scipy.optimize.milp


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Indices into each layer's options, and the program's own account of them."""

    attention: tuple[int, ...]
    ffn: tuple[int, ...]
    fused: tuple[bool, ...]  # layer's FFN is fused into the one before it
    seconds: float
    bytes: float
    kl: float
    gap: float = 0.0  # how far from the best it may be, as a fraction of its objective

    def groups(self, space: Space) -> tuple[Group, ...]:
        """The runs to fuse, (first, last) by layers of the input model."""
        groups: dict[int, int] = {}
        start = 0
        for index, (options, ffn) in enumerate(zip(space.layers, self.ffn, strict=True)):
            if options.ffn[ffn].part is None:
                continue
            if self.fused[index]:
                groups[start] = index
            else:
                start = index
        return tuple(groups.items())

    def fusing_kl(self, space: Space) -> float | None:
        """The scores of all that is fused, None where one is not known."""
        first_of = {i: first for first, last in self.groups(space) for i in range(first, last + 1)}
        total = 0.0
        for index, fused in enumerate(self.fused):
            further = space.fusing[index]
            if fused and further is None:
                return None
            if fused and further is not None:
                total += sum(further[: index - first_of[index]])
        return total


class Program:
    """A space with its costs: build once, solve under several limits."""

    def __init__(self, space: Space, costs: Costs, memory: Callable[[Architecture], float]) -> None:
        self.space, self.costs = space, costs
        count = Counter()
        self.x = [[count() for _ in layer.attention] for layer in space.layers]
        self.y = [[count() for _ in layer.ffn] for layer in space.layers]
        self.z = [count() for _ in space.layers]
        self.num_binary = count.value
        self.before = [count() for _ in space.layers]
        self.after = [count() for _ in space.layers]
        self.width = [count() for _ in space.layers] if self._width_matters() else []
        self.chain = [
            [self.z[i], *(count() for _ in range(1, reach))] for i, reach in enumerate(self._reach())
        ]
        self.curve = self._curve()
        pieces = [(0.0, 0.0), *self.curve.pieces] if self.curve.pieces else []
        self.refund = [count() for _ in space.layers] if pieces else []
        self.credit = [[count() for _ in space.layers] for _ in pieces]
        self.num_variables = count.value
        self.rows = Rows()
        self._choose_one()
        self._runs()
        self._decided()
        self._widths()
        self._chains()
        self._refunds(pieces)
        self._keep_an_attention()
        self.coefficients: dict[Quantity, np.ndarray] = {
            "seconds": self._seconds(),
            "bytes": self._bytes(memory),
            "kl": self._kl(),
        }
        self.constants: dict[Quantity, float] = {
            "seconds": costs.outside(),
            "bytes": self._base_bytes,
            "kl": 0.0,
        }

    def solve(
        self,
        minimise: Quantity,
        limits: Mapping[Quantity, float],
        *,
        then: Quantity | None = None,
        other_than: Sequence[Solution] = (),
        difference: int = 1,
        seconds: float = 60.0,
    ) -> Solution | None:
        """The solution with the least `minimise`, and of those the least `then`; None where there is none.

        Each limit is an upper bound. A solution differs from each of `other_than` in at least
        `difference` choices of attention and FFN. After `seconds` the best found so far is returned with
        its `gap`, or TimeoutError raised where none was found.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp

        rows = self.rows.copy()
        for name, limit in limits.items():
            self._limit(rows, name, limit)
        for solution in other_than:
            chosen = self._chosen(solution)
            rows.add(((i, 1.0) for i in chosen), upper=len(chosen) - difference)
        objective = SCALE * self._normal(minimise)
        if then is not None:
            objective = objective + SCALE * TIE * self._normal(then)
        matrix, lower, upper = rows.matrix(self.num_variables)
        integrality = np.zeros(self.num_variables)
        integrality[: self.num_binary] = 1
        with stdout_of_libraries_dropped():
            result = milp(
                objective,
                integrality=integrality,
                bounds=Bounds(0, 1),
                constraints=LinearConstraint(matrix, lower, upper),
                options={"time_limit": seconds, "mip_rel_gap": 1e-9},
            )
        if result.x is None:
            if result.status == STATUS_TIME:
                raise TimeoutError
            assert "nfeasible" in result.message, result.message
            return None
        return self._read(result.x, result.mip_gap if result.status == STATUS_TIME else 0.0)

    def _limit(self, rows: Rows, name: Quantity, limit: float) -> None:
        values = self.coefficients[name]
        scale = float(np.abs(values).max()) or 1.0
        terms = [(int(i), float(values[i] / scale)) for i in np.flatnonzero(values)]
        rows.add(terms, upper=(limit - self.constants[name]) / scale)

    def _normal(self, name: Quantity) -> np.ndarray:
        values = self.coefficients[name]
        total = sum(float(np.abs(values[group]).max()) for group in (*self.x, *self.y))
        return values / total if total else values

    def _chosen(self, solution: Solution) -> list[int]:
        return [
            *(group[i] for group, i in zip(self.x, solution.attention, strict=True)),
            *(group[i] for group, i in zip(self.y, solution.ffn, strict=True)),
        ]

    def _read(self, values: np.ndarray, gap: float) -> Solution:
        """From the solver's numbers, whole within its tolerance, to choices and what they come to."""
        attention = tuple(int(np.argmax(values[group])) for group in self.x)
        ffn = tuple(int(np.argmax(values[group])) for group in self.y)
        fused = tuple(bool(values[i] > 0.5) for i in self.z)
        chosen = Solution(attention=attention, ffn=ffn, fused=fused, seconds=0, bytes=0, kl=0)
        ones = [*self._chosen(chosen), *(i for i, yes in zip(self.z, fused, strict=True) if yes)]
        totals = {n: self.constants[n] + float(v[ones].sum()) for n, v in self.coefficients.items()}
        totals["seconds"] = self._true_seconds(chosen)
        totals["kl"] = float(self.coefficients["kl"][self._chosen(chosen)].sum())
        totals["kl"] += chosen.fusing_kl(self.space) or 0.0
        return Solution(attention=attention, ffn=ffn, fused=fused, gap=float(gap), **totals)

    def _true_seconds(self, solution: Solution) -> float:
        """Of the solution as it will be: a group is one FFN."""
        values = self.coefficients["seconds"]
        total = self.constants["seconds"] + float(values[self._chosen(solution)].sum())
        widths = [_width(x.ffn[i]) for x, i in zip(self.space.layers, solution.ffn, strict=True)]
        for first, last in solution.groups(self.space):
            members = [w for w in widths[first : last + 1] if w]
            parts = sum(self.costs.ffn(FFN(intermediate_size=w)) for w in members)
            total += self.costs.ffn(FFN(intermediate_size=sum(members))) - parts
        return total

    def _choose_one(self) -> None:
        for group in (*self.x, *self.y):
            self.rows.add(((i, 1.0) for i in group), lower=1, upper=1)

    def _runs(self) -> None:
        """`before`, `after` and `z` as the module's text has them."""
        last = len(self.z) - 1
        pinned = {i for a, b in self.space.groups for i in range(a, b + 1)}
        for index in range(last + 1):
            alone, gone, none = self._alone(index), self._gone(index), self._without_attention(index)
            for variables, neighbour in ((self.before, index - 1), (self.after, index + 1)):
                mine = [(variables[index], 1.0)]
                beyond = [(variables[neighbour], -1.0)] if 0 <= neighbour <= last else []
                self.rows.add([*mine, *minus(none)], upper=0)
                self.rows.add([*mine, *minus(alone), *beyond], upper=0)
                self.rows.add([*mine, *minus(alone), *minus(gone)], upper=0)
            fused = [(self.z[index], 1.0)]
            self.rows.add([*fused, *minus(alone)], upper=0)
            self.rows.add([*fused, *minus(none)], upper=0)
            self.rows.add([*fused, *([(self.before[index - 1], -1.0)] if index else [])], upper=0)
            if index not in pinned:
                self.rows.add([*fused, *([(self.after[index + 1], -1.0)] if index < last else [])], upper=0)

    def _decided(self) -> None:
        """Groups given by hand: their members are fused, and nothing else joins them."""
        for first, last in self.space.groups:
            self.rows.add([(self.z[first], 1.0)], upper=0)
            for index in range(first + 1, last + 1):
                self.rows.add([(self.z[index], 1.0), *minus(self._alone(index))], lower=0, upper=0)
            self.rows.add([(self.before[last], 1.0)], upper=0)

    def _width_matters(self) -> bool:
        return sum(_widest(x.ffn) for x in self.space.layers) > self.space.max_width

    def _widths(self) -> None:
        """The width of the group that ends at each layer, as a fraction of the limit."""
        limit = self.space.max_width
        for index, group in enumerate(self.y if self.width else ()):
            mine = [(self.width[index], 1.0)]
            own = [
                (i, -min(1.0, _width(x) / limit))
                for i, x in zip(group, self.space.layers[index].ffn, strict=True)
            ]
            self.rows.add([*mine, *own], lower=0)
            if not index:
                continue
            most = 1.0 + max(-value for _, value in own)
            before = [(self.width[index - 1], -1.0)]
            self.rows.add([*mine, *own, *before, (self.z[index], -most)], lower=-most)
            # an empty layer passes the group before it on
            passing = [*self._gone(index), *self._without_attention(index)]
            self.rows.add([*mine, *before, *((i, -c) for i, c in passing)], lower=-2)

    def _reach(self) -> list[int]:
        """How many layers before each can be fused with it, as far as their attention goes; at least 1."""
        reach: list[int] = []
        for index in range(len(self.z)):
            free = bool(self._without_attention(index))
            reach.append(reach[-1] + 1 if free and reach else 0)
        return [max(1, min(x, len(y or ()))) for x, y in zip(reach, self.space.fusing, strict=True)]

    def _chains(self) -> None:
        """chain[l][k]: layers l-k .. l are fused, or gone within; further members before l cost more."""
        for index, variables in enumerate(self.chain):
            for k in range(1, len(variables)):
                between = index - k
                holds = [(self.z[between], -1.0), *minus(self._gone(between))]
                self.rows.add([(variables[k], 1.0), (variables[k - 1], -1.0), *holds], lower=-1)

    def _curve(self) -> Curve:
        widths = {_width(x) for layer in self.space.layers for x in layer.ffn} - {0}
        total = sum(_widest(x.ffn) for x in self.space.layers)
        return Curve.of(self.costs, widths, min(total, self.space.max_width))

    def _refunds(self, pieces: Sequence[tuple[float, float]]) -> None:
        """What fusing saves beyond `saved`; refunds in units of twice the largest excess, credit of one."""
        unit = max(self.curve.excess_of.values(), default=0.0)
        for index, layer in enumerate(self.space.layers if pieces else ()):
            fused, mine = self.z[index], self.refund[index]
            self.rows.add([(mine, 1.0), (fused, -1.0)], upper=0)
            for (height, fall), credit in zip(pieces, self.credit, strict=True):
                earned = [
                    (i, (self.curve.excess_of[w] + fall * w - height) / unit)
                    for i, x in zip(self.y[index], layer.ffn, strict=True)
                    if (w := _width(x))
                ]
                beyond = [(credit[index + 1], -1.0)] if index + 1 < len(credit) else []
                handed = [(credit[index], 1.0), *beyond]
                self.rows.add([*earned, (fused, height / unit), (mine, -2.0), *handed], lower=0)
                carried = [(fused, -1.0), *minus(self._gone(index))]
                self.rows.add([(credit[index], 1.0), *(carried if index else [])], upper=0)

    def _keep_an_attention(self) -> None:
        """A model keeps one attention at least, if it had one: no format or runtime takes less."""
        kept = [
            i
            for group, options in zip(self.x, self.space.layers, strict=True)
            for i, x in zip(group, options.attention, strict=True)
            if x.part is not None
        ]
        if kept:
            self.rows.add(((i, 1.0) for i in kept), lower=1)

    def _alone(self, index: int) -> list[Term]:
        """1 where an FFN is left that can be fused; its attention is another matter."""
        options = self.space.layers[index].ffn
        return [(i, 1.0) for i, x in zip(self.y[index], options, strict=True) if isinstance(x.part, FFN)]

    def _gone(self, index: int) -> list[Term]:
        options = self.space.layers[index].ffn
        return [(i, 1.0) for i, x in zip(self.y[index], options, strict=True) if x.part is None]

    def _without_attention(self, index: int) -> list[Term]:
        options = self.space.layers[index].attention
        return [(i, 1.0) for i, x in zip(self.x[index], options, strict=True) if x.part is None]

    def _kl(self) -> np.ndarray:
        values = np.zeros(self.num_variables)
        for index, layer in enumerate(self.space.layers):
            values[self.x[index]] = [x.kl or 0.0 for x in layer.attention]
            values[self.y[index]] = [x.kl or 0.0 for x in layer.ffn]
        for variables, further in zip(self.chain, self.space.fusing, strict=True):
            for variable, score in zip(variables, further or (), strict=False):
                values[variable] = score
        return values

    def _seconds(self) -> np.ndarray:
        values = np.zeros(self.num_variables)
        for index, layer in enumerate(self.space.layers):
            values[self.x[index]] = [self.costs.attention(x.part) for x in layer.attention]
            values[self.y[index]] = [self.costs.ffn(x.part) for x in layer.ffn]
        values[self.z] = -self.curve.saved
        values[self.refund] = -2 * max(self.curve.excess_of.values(), default=0.0)
        return values

    def _bytes(self, memory: Callable[[Architecture], float]) -> np.ndarray:
        """Each option against its layer's first one; the first ones together are the constant."""
        layers = self.space.layers
        first = tuple(0 for _ in layers)
        self._base_bytes = memory(self.space.with_parts(first, first))
        values = np.zeros(self.num_variables)
        known: dict[object, float] = {}
        for index, layer in enumerate(layers):
            sides: tuple[tuple[bool, list[int], tuple[Option[Any], ...]], ...] = (
                (True, self.x[index], layer.attention),
                (False, self.y[index], layer.ffn),
            )
            for attention, group, options in sides:
                for place, option in enumerate(options[1:], start=1):
                    key = (attention, options[0].part, option.part)
                    if key not in known:
                        changed = (*first[:index], place, *first[index + 1 :])
                        pair = (changed, first) if attention else (first, changed)
                        known[key] = memory(self.space.with_parts(*pair)) - self._base_bytes
                    values[group[place]] = known[key]
        return values


def _width(option: Option[FFNPart]) -> int:
    return option.part.intermediate_size if isinstance(option.part, FFN) else 0


def _widest(options: Sequence[Option[FFNPart]]) -> int:
    return max(map(_width, options))
