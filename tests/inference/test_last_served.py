"""What was served last, kept where others may keep theirs."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from medloop.schemas import Approval
from medloop_inference.last_served import LastServed


def test_writers_with_the_same_process_number_do_not_meet(tmp_path: Path) -> None:
    """As two containers do that share a home: in both the number is 1."""
    approvals = [
        Approval(
            sequence=sequence,
            action="approve",
            model="tiny",
            version="1",
            bundle_digest="0" * 64,
            decision_id="d",
            approver="Dr. Test",
            key_id="k",
        )
        for sequence in range(1, 9)
    ]
    path = tmp_path / "last_served.json"
    with ThreadPoolExecutor(len(approvals)) as writers:
        for _ in range(10):
            list(writers.map(LastServed(path).write, approvals))
            assert LastServed(path).read() in approvals
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
