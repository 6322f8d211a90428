"""Engines at given URLs, as weight sync sees them, and what it says about them."""

from collections.abc import Callable, Sequence


class GivenEngines:
    def __init__(self, *urls: str) -> None:
        self.urls = list(urls)
        self.versions: dict[str, int] = {}  # by URL
        self.failures: dict[str, str] = {}
        self.coming_up: str | None = None  # the only one that is up when another was lost

    def to_sync(self, on_progress: Callable[[], None]) -> list[str]:
        return list(self.urls)

    def gpus(self, url: str) -> list[int]:
        return []

    def synced(self, urls: Sequence[str], version: int) -> None:
        self.versions |= dict.fromkeys(urls, version)

    def lost(self, url: str, why: str) -> None:
        self.failures[url] = why
        if self.coming_up is not None:
            self.urls = [self.coming_up]
