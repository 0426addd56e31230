"""What the journey found: a line for each thing that was tried."""

from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table


@dataclass
class Report:
    console: Console = field(default_factory=Console)
    lines: list[tuple[str, str, str, bool]] = field(default_factory=list)

    def note(self, what: str, found: str, wanted: str, passed: bool) -> None:
        """One thing that was tried; said at once, since the journey takes minutes."""
        self.lines.append((what, found, wanted, passed))
        self.console.print(f"{'✓' if passed else '✗'} {what}: {found} (wanted: {wanted})", highlight=False)

    @property
    def passed(self) -> bool:
        return all(passed for *_, passed in self.lines)

    def show(self, title: str) -> None:
        table = Table("", "what", "found", "wanted", title=title, title_justify="left")
        for what, found, wanted, passed in self.lines:
            table.add_row("✓" if passed else "✗", what, found, wanted)
        self.console.print(table)
