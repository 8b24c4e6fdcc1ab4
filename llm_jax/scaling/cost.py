"""What training costs: time, chips, money, energy and carbon, from FLOPs and the chip table.

    time    = FLOPs / (chips * peak * MFU)
    dollars = chips * hours * price
    kWh     = chips * hours * watts * PUE / 1000
    kg CO2e = kWh * grid / 1000

Nothing here is measured, but for what the caller has measured: MFU and watts of a run of the same kind say
more than any table. A price, a PUE (what a data centre draws for each watt of its machines) and a grid
intensity differ by place and year, so none is assumed: what is not given is not counted, and the text says
so. The power is that of the chips alone; their hosts and network come on top (but see hardware.POD).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from llm_jax import hardware
from llm_jax.errors import UserError
from llm_jax.hardware import Chip
from llm_jax.planning import launch_slices

HOUR = 3600
DAY = 24 * HOUR
YEAR = 365.25 * DAY


@dataclass(frozen=True)
class Fleet:
    """Chips of one kind. device: as jax counts them, of which a chip may have two."""

    name: str
    device: Chip
    chips: int

    @classmethod
    def parse(cls, name: str, chips: int | None = None) -> Fleet:
        """Of ``v4-128``, ``v6e-256``, ``v5p:4x4x8`` and ``H100:8x2``, which say how many chips; of ``H100``
        or ``v5p`` with ``chips``, or one. Raises UserError for an unknown name and an unclear number."""
        kind, colon, _ = name.partition(":")
        device, counted = hardware.named(kind)
        if colon:
            counted = launch_slices.parse(name).chips
        if counted and chips and counted != chips:
            raise UserError(f"{name} has {counted:,} chips; leave the number {chips:,} out")
        count = counted or chips or 1
        if count < 1:
            raise UserError(f"{count} chips: give 1 or more")
        return cls(name, device, count)

    def speed(self, mfu: float) -> float:
        """FLOP/s of them all. mfu: the share of the peak that the model's own FLOPs make up."""
        if not 0 < mfu <= 1:
            raise UserError(f"an MFU of {mfu}: give a share of the peak above 0 and at most 1, such as 0.4")
        return self.chips * self.device.per_chip * self.device.flops * mfu


@dataclass(frozen=True)
class Rates:
    """mfu: of the run. price: dollars a chip-hour. pue: power usage effectiveness, 1 = the chips alone. grid:
    g CO2e a kWh. watts: of a chip as measured, instead of the table's. None = not known."""

    mfu: float = 0.4
    price: float | None = None
    pue: float = 1.0
    grid: float | None = None
    watts: float | None = None

    def __post_init__(self) -> None:
        if self.pue < 1:
            raise UserError(
                f"a PUE of {self.pue}: it is the whole data centre's power over its machines', 1 or more"
            )
        for name in ("price", "grid", "watts"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"{name} {getattr(self, name)}: give a positive number")


@dataclass(frozen=True)
class Cost:
    """seconds: of training alone, at the speed of the MFU. None = a rate or the chip's power is not known."""

    fleet: Fleet
    rates: Rates
    flops: float
    seconds: float
    chip_hours: float
    dollars: float | None
    kwh: float | None
    kg_co2: float | None


def fewest(name: str, flops: float, days: float, mfu: float) -> int:
    """Chips of a kind that make so many FLOPs in a time. Raises UserError for a name that counts them."""
    device, counted = hardware.named(name)
    if counted:
        raise UserError(f"{name} says how many chips: to count them by a time, name the chip alone, as v5p")
    return math.ceil(flops / (days * DAY * Fleet(name, device, 1).speed(mfu)))


def of(flops: float, fleet: Fleet, rates: Rates) -> Cost:
    """What so many FLOPs cost. See the top of the file."""
    seconds = flops / fleet.speed(rates.mfu)
    chip_hours = fleet.chips * seconds / HOUR
    watts = rates.watts or fleet.device.watts
    kwh = chip_hours * watts * rates.pue / 1000 if watts else None
    return Cost(
        fleet=fleet,
        rates=rates,
        flops=flops,
        seconds=seconds,
        chip_hours=chip_hours,
        dollars=None if rates.price is None else chip_hours * rates.price,
        kwh=kwh,
        kg_co2=None if kwh is None or rates.grid is None else kwh * rates.grid / 1000,
    )


def lines(cost: Cost) -> Iterator[str]:
    """As a person reads it, every assumption beside its number."""
    rates, fleet = cost.rates, cost.fleet
    peak = fleet.device.flops * fleet.device.per_chip / 1e12
    yield (
        f"{cost.flops:.3g} FLOPs on {fleet.chips:,} chips ({fleet.name}, {peak:,.0f} TFLOP/s each) at "
        f"{rates.mfu:.1%} MFU: {duration(cost.seconds)}, {cost.chip_hours:,.0f} chip-hours"
    )
    if cost.dollars is None:
        yield "cost: give --price, dollars a chip-hour"
    else:
        yield f"cost: {cost.dollars:,.0f} dollars at {rates.price:g} a chip-hour"
    if cost.kwh is None:
        yield "energy: not known, as no power of this chip has been published: give --watts"
        return
    power = f"{rates.watts or fleet.device.watts:,.0f} W a chip"
    source = "as given" if rates.watts else fleet.device.watts_are
    centre = f"a PUE of {rates.pue:g}" if rates.pue > 1 else "the chips alone (no --pue)"
    yield f"energy: {cost.kwh:,.0f} kWh by {power} ({source}) and {centre}"
    if cost.kg_co2 is None:
        yield "carbon: give --grid, g CO2e a kWh"
    else:
        yield f"carbon: {cost.kg_co2 / 1000:,.2f} t CO2e at {rates.grid:g} g a kWh, of operation alone"


def duration(seconds: float) -> str:
    for unit, size in (("years", YEAR), ("days", DAY), ("hours", HOUR), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} seconds"
