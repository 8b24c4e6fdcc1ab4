"""What training costs, against numbers that were published."""

import pytest

from llm_jax.errors import UserError
from llm_jax.scaling import cost
from llm_jax.scaling.cost import DAY, YEAR, Fleet, Rates

V100_AT_28 = Rates(mfu=28 / 125, price=1.5)


def test_gpt3():
    """3.14e23 FLOPs at 28 TFLOP/s a GPU and 1.5 dollars an hour: 355 GPU-years, 4.6 million dollars."""
    found = cost.of(3.14e23, Fleet.parse("V100"), V100_AT_28)
    assert found.seconds / YEAR == pytest.approx(355, abs=0.5)
    assert found.dollars == pytest.approx(4.6e6, rel=0.02)
    many = cost.of(3.14e23, Fleet.parse("V100", 1000), V100_AT_28)
    assert many.seconds == pytest.approx(found.seconds / 1000)
    assert many.dollars == pytest.approx(found.dollars)


MONTHS = {1: 30, 2: 61, 3: 91, 6: 183, 12: 365}  # months of 365 / 12 days, in whole days


@pytest.mark.parametrize(
    "params, gpus, days, billions",
    [
        (1e9, 8, (14, 21), (81, 121)),
        (10e9, 64, (MONTHS[1], MONTHS[2]), (138, 281)),
        (100e9, 512, (MONTHS[3], MONTHS[6]), (335, 675)),
        (1e12, 2048, (MONTHS[6], MONTHS[12]), (270, 538)),
    ],
)
def test_an_often_quoted_table_implies_few_tokens(params, gpus, days, billions):
    """D = 8 V100s * 125 TFLOP/s * 40% * time / 6N: less than a token a parameter at 1T, 81 to 121 at 1B."""
    speed = Fleet.parse("V100", gpus).speed(0.4)
    assert tuple(round(speed * d * DAY / (6 * params) / 1e9) for d in days) == billions


@pytest.mark.parametrize(
    "name, given, chips, teraflops",
    [
        ("H100", 256, 256, 989),
        ("H100:8x2", None, 16, 989),
        ("h100-pcie:8", None, 8, 756),
        ("v3-32", None, 16, 123),
        ("v4-128", None, 64, 275),
        ("v5p-256", 128, 128, 459),
        ("v5p:4x4x8", None, 128, 459),
        ("v5litepod-16", None, 16, 197),
        ("v5e:4x4", None, 16, 197),
        ("v6e-256", None, 256, 918),
        ("tpu7x:4x4x4", None, 64, 2307),
        ("tpu7x-128", None, 64, 2307),
    ],
)
def test_fleets(name, given, chips, teraflops):
    """A chip counts once, whatever jax calls a device: speed and price are both of chips."""
    fleet = Fleet.parse(name, given)
    assert fleet.chips == chips
    assert fleet.speed(0.5) == pytest.approx(0.5 * chips * teraflops * 1e12)


@pytest.mark.parametrize(
    "name, chips, words",
    [
        ("v5p-256", 256, "has 128 chips"),
        ("H100", -1, "1 or more"),
        ("cpu:8", None, "not a known chip"),
        ("v5p:3x3x3", None, "not offered"),
        ("Cray", 8, "not a known chip"),
    ],
)
def test_fleets_that_are_not_clear(name, chips, words):
    with pytest.raises(UserError, match=words):
        Fleet.parse(name, chips)


@pytest.mark.parametrize("kind", ["H100", "v3", "tpu7x"])
def test_the_fewest_chips_that_are_in_time(kind):
    chips = cost.fewest(kind, 1e23, 30, 0.4)
    assert cost.of(1e23, Fleet.parse(kind, chips), Rates()).seconds <= 30 * DAY
    assert cost.of(1e23, Fleet.parse(kind, chips - 1), Rates()).seconds > 30 * DAY


def test_a_slice_is_not_counted_again():
    with pytest.raises(UserError, match="name the chip alone"):
        cost.fewest("v4-128", 1e23, 30, 0.4)


def test_energy_and_carbon():
    """1,000 chip-hours at 700 W and a PUE of 1.1: 770 kWh, at 400 g 308 kg. Measured watts replace a TDP."""
    fleet = Fleet.parse("H100", 10)
    flops = fleet.speed(0.4) * 100 * cost.HOUR
    found = cost.of(flops, fleet, Rates(pue=1.1, grid=400))
    assert (found.chip_hours, found.kwh, found.kg_co2) == pytest.approx((1000, 770, 308))
    assert cost.of(flops, fleet, Rates(watts=350)).kwh == pytest.approx(350)
    assert found.dollars is None


def test_a_chip_of_unknown_power_gives_no_energy():
    """Google has published no power of v5p: nothing is made up, until it is measured."""
    fleet = Fleet.parse("v5p-256")
    found = cost.of(1e21, fleet, Rates(price=4.2, pue=1.1, grid=400))
    assert found.kwh is None and found.kg_co2 is None and found.dollars > 0
    assert "--watts" in " ".join(cost.lines(found))
    assert cost.of(1e21, fleet, Rates(watts=300, grid=400)).kg_co2 > 0


def test_lines_say_every_assumption():
    rates = Rates(mfu=0.41, price=2.5, pue=1.12, grid=387)
    text = "\n".join(cost.lines(cost.of(1e23, Fleet.parse("H100", 256), rates)))
    for part in ("256 chips", "41.0% MFU", "2.5 a chip-hour", "700 W", "TDP", "1.12", "387 g"):
        assert part in text, part
    bare = "\n".join(cost.lines(cost.of(1e23, Fleet.parse("H100"), Rates())))
    assert "--price" in bare and "--grid" in bare and "--pue" in bare


@pytest.mark.parametrize("rates", [{"pue": 0.9}, {"price": -1}, {"grid": -400}, {"watts": -3}])
def test_rates_that_cannot_be(rates):
    with pytest.raises(UserError):
        Rates(**rates)


@pytest.mark.parametrize("mfu", [0, 40, -0.1])
def test_an_mfu_that_cannot_be(mfu):
    with pytest.raises(UserError, match="MFU"):
        cost.of(1e21, Fleet.parse("H100"), Rates(mfu=mfu))
