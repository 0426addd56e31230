import io
import json
import logging
import sys

from medloop.log import JsonFormatter, request_id


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
