import io
import json
import logging
import sys
from collections.abc import Iterator

import pytest
from medloop.log import JsonFormatter, configure_logging, request_id


def make_record(message: str, **extra: object) -> str:
    logger = logging.Logger("test")
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter("inference"))
    logger.addHandler(handler)
    logger.info(message, extra=extra)
    return stream.getvalue()


def test_a_record_is_one_json_line_with_its_request_and_extras() -> None:
    token = request_id.set("r-1")
    try:
        line = make_record("two\nlines", code="storage-full")
    finally:
        request_id.reset(token)
    assert line.count("\n") == 1
    entry = json.loads(line)
    assert entry["message"] == "two\nlines"
    assert entry["service"] == "inference"
    assert entry["request_id"] == "r-1"
    assert entry["code"] == "storage-full"


def test_an_exception_is_told_with_its_traceback() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, __file__, 1, "failed", None, sys.exc_info())
    assert "ValueError: why" in json.loads(JsonFormatter("x").format(record))["exception"]


@pytest.fixture
def root_logger() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.mark.usefixtures("root_logger")
def test_our_own_logs_are_told_and_the_chatter_of_others_is_not() -> None:
    stream = io.StringIO()
    configure_logging("trainer", stream=stream)
    for name in ("medloop.data", "medloop_trainer.loop", "onnxscript.optimizer"):
        logging.getLogger(name).info("hello")
    logging.getLogger("onnxscript.optimizer").warning("careful")
    told = [(entry["logger"], entry["level"]) for entry in map(json.loads, stream.getvalue().splitlines())]
    assert told == [("medloop.data", "info"), ("medloop_trainer.loop", "info"), ("onnxscript.optimizer", "warning")]
