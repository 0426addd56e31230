"""`python take_messages.py COMMAND…`: take all messages out of RETRAINING_QUEUE, then become COMMAND.

They are a bell. COMMAND asks the data sets themselves what is new, so that a message for another model, or a version
that a weekly training has learnt and registered before, trains nothing, and one that comes later rings again.
"""

import os
import sys
from typing import Any

import boto3

WAIT_SECONDS = 2
"""For a first message. Without waiting SQS asks some of its servers only."""


def take_all(sqs: Any, queue: str) -> int:
    """Take every message out of the queue with this address; how many there were."""
    taken = 0
    while messages := _some(sqs, queue):
        for message in messages:
            sqs.delete_message(QueueUrl=queue, ReceiptHandle=message["ReceiptHandle"])
        taken += len(messages)
    return taken


def _some(sqs: Any, queue: str) -> list[dict[str, str]]:
    answer = sqs.receive_message(QueueUrl=queue, MaxNumberOfMessages=10, WaitTimeSeconds=WAIT_SECONDS)
    found: list[dict[str, str]] = answer.get("Messages", [])
    return found


if __name__ == "__main__":
    sys.stderr.write(f"{take_all(boto3.client('sqs'), os.environ['RETRAINING_QUEUE'])} messages taken\n")
    os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606 - the command that was given
