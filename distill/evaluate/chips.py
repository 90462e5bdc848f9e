"""Apple's chips: memory bandwidth and operations of the Neural Engine, as far as a source states them.

Apple gives the Neural Engine's rate in "trillion operations per second" and for none of these chips says at which
precision; from A17 Pro and M4 on it is widely read as int8. What no source states is None and stays unknown.
"""

from __future__ import annotations

from typing import NamedTuple


class Source(NamedTuple):
    """Where a figure comes from."""

    url: str
    date: str
    """Of publication."""


class Chip(NamedTuple):
    """One chip; of a chip that is sold in several widths of memory, the widest."""

    name: str
    bandwidth: float | None
    """GB/s of memory (1e9 bytes), shared by all compute units."""
    tops: float | None
    """Of the Neural Engine, 1e12 operations a second, precision not stated."""
    sources: tuple[str, ...]


PRECISION = "not stated by Apple"
LARGEST_CACHE = 96_000_000
"""Bytes of the largest system cache of any of these chips: two of M1 Max's 48 MB. What is smaller may stay in it."""

SOURCES = {
    "A14, A15": Source("https://pocketnow.com/apple-a15-bionic-chip-5nm", "2021-09-14"),
    "A16": Source("https://rss.wongcw.com/apple-unveils-the-a16-bionic-its-most-powerful-mobile-chip-yet-22631.html",
                  "2022-09-07"),
    "A17, M3": Source("https://www.macrumors.com/2023/10/31/apple-m3-pro-less-memory-bandwidth/", "2023-10-31"),
    "A18": Source("https://www.phonearena.com/news/a18-18-pro-application-processors-faster-more-energy-efficient_id162371",
                  "2024-09-09"),
    "A18 Pro": Source("https://www.smbom.com/news/14137", "2024-09-10"),
    "A19": Source("https://ai-articles.com/en/news/apple-highlights-a19-pro-chip-performance-in-iphone-air-and-iphone-17-pro",
                  "2025-09"),
    "M1": Source("https://techecho.bigdataflowing.com/zh/item/25066217", "2020-11-10"),
    "M1, M3 memory": Source("https://abachy.com/news/apples-m3-series-chips-enhanced-performance-and-advanced-gpus",
                            "2023-10-31"),
    "M1 Pro, Max": Source("https://www.apple.com/gw/newsroom/2021/10/introducing-m1-pro-and-m1-max-the-most-powerful-chips-"
                          "apple-has-ever-built", "2021-10-18"),
    "M1 Ultra": Source("https://voonze.com/new-at-the-event-m1-ultra-chip/", "2022-03-09"),
    "M2": Source("https://www.phoronix.com/scan.php?page=news_item&px=Apple-M2", "2022-06-06"),
    "M2 engine": Source("https://www.geeky-gadgets.com/apple-m2-10-core-gpu-07-06-2022/", "2022-06-07"),
    "M2 Pro, Max": Source("https://www.apple.com/hk/en/newsroom/2023/01/apple-unveils-m2-pro-and-m2-max-next-generation-"
                          "chips-for-next-level-workflows", "2023-01-17"),
    "M2 Pro, Max engine": Source("https://meterpreter.org/apple-announces-m2-pro-and-m2-max-chips/", "2023-01-17"),
    "M2 Ultra": Source("https://gadgetpilipinas.net/?p=146903", "2023-06-05"),
    "M3 Ultra": Source("https://techpowerup.com/news-tags/Mac%20Studio", "2025-03-05"),
    "M4": Source("https://www.engadget.com/apples-m4-chip-arrives-with-a-big-focus-on-ai-142448428.html", "2024-05-07"),
    "M4 Pro, Max": Source("https://techmoran.com/2024/10/31/apple-unveils-its-most-powerful-chips-the-m4-pro-and-m4-max/",
                          "2024-10-31"),
    "M5": Source("https://www.lowyat.net/2025/369913/apple-m5", "2025-10-15"),
    "M5 Pro, Max": Source("https://pepelac.news/en/posts/id30875-apple-m5-pro-and-m5-max-processors-unveiled-for-macbook-"
                          "pro-laptops", "2026-03"),
    "system cache": Source("https://www.anandtech.com/show/17024/apple-m1-max-performance-review", "2021-10-25"),
}  # fmt: skip
"""Apple's own announcements, or reports of them."""

CHIPS = (
    Chip("A14", None, 11.0, ("A14, A15",)),
    Chip("A15", None, 15.8, ("A14, A15",)),
    Chip("A16", None, 17.0, ("A16",)),
    Chip("A17 Pro", None, 35.0, ("A17, M3",)),
    Chip("A18", None, 35.0, ("A18",)),
    Chip("A18 Pro", None, 35.0, ("A18 Pro",)),
    Chip("A19", None, None, ("A19",)),
    Chip("A19 Pro", None, None, ("A19",)),
    Chip("M1", 66.6, 11.0, ("M1, M3 memory", "M1")),
    Chip("M1 Pro", 200.0, None, ("M1 Pro, Max",)),
    Chip("M1 Max", 400.0, None, ("M1 Pro, Max",)),
    Chip("M1 Ultra", 800.0, 22.0, ("M1 Ultra",)),
    Chip("M2", 100.0, 15.8, ("M2", "M2 engine")),
    Chip("M2 Pro", 200.0, 15.8, ("M2 Pro, Max", "M2 Pro, Max engine")),
    Chip("M2 Max", 400.0, 15.8, ("M2 Pro, Max", "M2 Pro, Max engine")),
    Chip("M2 Ultra", 800.0, 31.6, ("M2 Ultra",)),
    Chip("M3", 100.0, 18.0, ("M1, M3 memory", "A17, M3")),
    Chip("M3 Pro", 150.0, 18.0, ("A17, M3",)),
    Chip("M3 Max", 400.0, 18.0, ("A17, M3",)),
    Chip("M3 Ultra", 819.0, None, ("M3 Ultra",)),
    Chip("M4", 120.0, 38.0, ("M4",)),
    Chip("M4 Pro", 273.0, None, ("M4 Pro, Max",)),
    Chip("M4 Max", 546.0, None, ("M4 Pro, Max",)),
    Chip("M5", 153.0, None, ("M5",)),
    Chip("M5 Pro", 307.0, None, ("M5 Pro, Max",)),
    Chip("M5 Max", 614.0, None, ("M5 Pro, Max",)),
)
