"""Numbers for people: `1.2M`, `3m20s`."""


def quantity(value: float | int) -> str:
    """Three significant digits with a unit: 12.3k, 4.56M."""
    value = float(f"{value:.3g}")
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float | int) -> str:
    """Two largest units: 45s, 3m20s, 2h05m, 3d04h."""
    whole = round(seconds)
    for big, small, names in ((86400, 3600, "dh"), (3600, 60, "hm"), (60, 1, "ms")):
        if whole >= big:
            return f"{whole // big}{names[0]}{whole % big // small:02d}{names[1]}"
    return f"{whole}s"
