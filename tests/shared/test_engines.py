"""Every engine answers as the closed form says, each row for itself, and is refused where it does not."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from medloop.bundle import GOLDEN, MODEL, Bundle, Golden, Pixels, write_card
from medloop.engines import OFFERED, Network, check_offered, open_network
from medloop.engines.checks import VERDICTS, compare, disagreement_bound, engine_version, find_check, judge
from medloop.errors import InvalidRequest, UntrustedModel
from medloop.schemas import EngineCheck, EngineVerdict
from medloop.storage.records import RecordStore
from medloop.testing import tiny_bundle, tiny_network, tiny_probabilities

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


@pytest.fixture(params=OFFERED, ids=lambda pair: "-".join(pair))
def engine(request: pytest.FixtureRequest) -> tuple[str, str]:
    """An engine and a precision that this machine can run."""
    engine, precision = request.param
    try:
        check_offered(engine, precision)
    except InvalidRequest as exc:
        pytest.skip(exc.detail)
    return engine, precision


def images(count: int) -> Pixels:
    levels = np.random.default_rng(1).integers(0, 256, (count, 1, 1, 1))
    noise = np.random.default_rng(2).integers(-20, 20, (count, 16, 16, 1))
    return np.asarray(np.clip(levels + noise, 0, 255), np.uint8)


def test_answers_are_the_known_ones_and_each_row_is_for_itself(tmp_path: Path, engine: tuple[str, str]) -> None:
    network = open_network(tiny_bundle(tmp_path, bias=0.5), *engine)
    assert (network.engine, network.precision) == engine
    asked = images(7)
    asked.flags.writeable = False  # as the mapped images of a data set are
    together = network.run(asked).probabilities
    expected = [tiny_probabilities(image, 2, 0.5) for image in asked]
    np.testing.assert_allclose(together, expected, atol=TOLERANCE[engine[1]])
    alone = np.concatenate([network.run(image[None]).probabilities for image in asked])
    np.testing.assert_allclose(alone, together, atol=1e-6)
    mirrored = np.concatenate([asked, asked])[:, ::-1]  # memory in another order than its axes
    np.testing.assert_allclose(network.run(mirrored[::-1]).probabilities[:7], together[::-1], atol=1e-6)


def test_answers_of_calls_at_once_are_not_mixed_up(tmp_path: Path, engine: tuple[str, str]) -> None:
    network = open_network(tiny_bundle(tmp_path), *engine)
    batches = [images(20)[start : start + count] for start in range(10) for count in (1, 3, 8)]
    alone = [network.run(batch).probabilities for batch in batches]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda batch: network.run(batch), batches * 5))
    for found, expected in zip(together, alone * 5, strict=True):
        np.testing.assert_array_equal(found.probabilities, expected)


def test_golden_inputs_pass_on_the_machine_that_made_them(tmp_path: Path, engine: tuple[str, str]) -> None:
    bundle = tiny_bundle(tmp_path)
    check = open_network(bundle, *engine).check_golden()
    assert (check.engine, check.precision, check.source) == (*engine, "golden")
    assert check.images == len(bundle.golden.prepared)
    assert check.max_difference <= TOLERANCE[engine[1]]
    assert check.agreement == 1.0


@pytest.mark.parametrize("field", ["pixels", "probabilities"])
def test_golden_inputs_with_other_answers_are_refused(tmp_path: Path, engine: tuple[str, str], field: str) -> None:
    bundle = tiny_bundle(tmp_path)
    golden = bundle.golden
    pixels, probabilities = golden.pixels.copy(), golden.probabilities.copy()
    if field == "pixels":
        pixels[0, 0, 0, 0] ^= 1
    else:
        probabilities[0] += [0.02, -0.02]
    Golden(golden.encoded, pixels, golden.prepared, probabilities).save(tmp_path / GOLDEN)
    resealed = write_card(tmp_path, bundle.card)
    with pytest.raises(UntrustedModel, match="olden"):
        open_network(resealed, *engine).check_golden()


def test_how_close_golden_answers_must_be_depends_on_what_gave_them(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    golden = bundle.golden
    shifted = golden.probabilities + np.array([5e-4, -5e-4], np.float32)
    Golden(golden.encoded, golden.pixels, golden.prepared, shifted).save(tmp_path / GOLDEN)
    resealed = write_card(tmp_path, bundle.card)
    with pytest.raises(UntrustedModel, match="1e-04"):
        open_network(resealed).check_golden()
    if engine_is_here("openvino", "float32"):
        assert open_network(resealed, "openvino").check_golden().max_difference == pytest.approx(5e-4, abs=1e-5)


def engine_is_here(engine: str, precision: str) -> bool:
    try:
        check_offered(engine, precision)
    except InvalidRequest:
        return False
    return True


def reseal(folder: Path, name: str, data: bytes) -> Bundle:
    """A bundle whose hashes agree, but whose `name` is `data`."""
    bundle = tiny_bundle(folder)
    (folder / name).write_bytes(data)
    return write_card(folder, bundle.card)


def test_a_file_that_is_no_network_is_not_trusted(tmp_path: Path, engine: tuple[str, str]) -> None:
    with pytest.raises(UntrustedModel, match=r"model\.onnx"):
        open_network(reseal(tmp_path, MODEL, b"no network"), *engine)


def test_golden_inputs_that_cannot_be_read_or_check_nothing_are_not_trusted(tmp_path: Path) -> None:
    with pytest.raises(UntrustedModel, match=r"golden\.npz"):
        open_network(reseal(tmp_path / "a", GOLDEN, b"no archive")).check_golden()
    bundle = tiny_bundle(tmp_path / "b")
    golden = bundle.golden
    Golden((), golden.pixels[:0], golden.prepared, golden.probabilities).save(tmp_path / "b" / GOLDEN)
    with pytest.raises(UntrustedModel, match="too little"):
        open_network(write_card(tmp_path / "b", bundle.card)).check_golden()


@pytest.mark.parametrize(
    "wrong", [("tensorrt", "float32"), ("onnxruntime", "bfloat16"), ("openvino", "int8"), ("openvino", "float16")]
)
def test_what_is_not_offered_is_refused_by_naming_what_is(tmp_path: Path, wrong: tuple[str, str]) -> None:
    with pytest.raises(InvalidRequest, match="bfloat16 on openvino"):
        open_network(tiny_bundle(tmp_path), *wrong)


def test_a_missing_openvino_is_told_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InvalidRequest, match="extra openvino"):
        open_network(tiny_bundle(tmp_path), "openvino")


def test_openvino_reports_to_nobody_and_is_imported_only_when_asked_for(tmp_path: Path) -> None:
    if not engine_is_here("openvino", "float32"):
        pytest.skip("OpenVINO is not installed")
    tiny_bundle(tmp_path)
    code = (
        "import sys; from pathlib import Path; from medloop.bundle import read_bundle; "
        "from medloop.engines import open_network; bundle = read_bundle(Path(sys.argv[1])); "
        "open_network(bundle).check_golden(); assert 'openvino' not in sys.modules; "
        "open_network(bundle, 'openvino').check_golden(); "
        "assert not [n for n, m in sys.modules.items() if n.startswith('openvino_telemetry') and m]; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)


def test_a_signal_finds_the_process_alive_after_openvino_has_gone(tmp_path: Path) -> None:
    """Its plug-in takes the stack that signals are handled on with it, if it was loaded in the main thread."""
    if not engine_is_here("openvino", "float32"):
        pytest.skip("OpenVINO is not installed")
    tiny_bundle(tmp_path)
    code = (
        "import gc, os, signal, sys, threading; from pathlib import Path; from medloop.bundle import read_bundle; "
        "from medloop.engines import open_network, openvino; "
        "kept = [open_network(read_bundle(Path(sys.argv[1])), 'openvino')]; kept[0].check_golden(); "
        "drop = lambda: (kept.clear(), openvino._core.cache_clear(), gc.collect()); "
        "thread = threading.Thread(target=drop); thread.start(); thread.join(); "
        "signal.signal(signal.SIGTERM, lambda *_: print('handled')); os.kill(os.getpid(), signal.SIGTERM)"
    )
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def verdict(digest: str = "d", passed: bool = True, engine_version_: str | None = None) -> EngineVerdict:
    check = EngineCheck(
        engine="onnxruntime", precision="float32", source="calibration", images=9, max_difference=0, agreement=1
    )
    return EngineVerdict(
        model="tiny",
        version="1",
        bundle_digest=digest,
        dataset_id="0" * 64,
        engine_version=engine_version_ or engine_version("onnxruntime"),
        cpu="any",
        check=check,
        passed=passed,
    )


def keep(records: RecordStore, *verdicts: EngineVerdict) -> None:
    for one in verdicts:
        assert records.put_once(VERDICTS, one.id, one.model_dump(mode="json"))


def test_a_check_counts_for_its_own_bundle_engine_and_package_only(records: RecordStore) -> None:
    asked = ("tiny", "1", "d", "onnxruntime", "float32")
    assert find_check(records, *asked) is None
    keep(records, verdict(digest="other"), verdict(engine_version_="0.1"))
    assert find_check(records, *asked) is None
    keep(records, verdict(), verdict(digest="other", passed=False))
    assert find_check(records, *asked) == verdict().check
    assert find_check(records, "tiny", "1", "d", "onnxruntime", "bfloat16") is None
    assert find_check(records, "tiny", "2", "d", "onnxruntime", "float32") is None


def test_the_newest_check_counts(records: RecordStore) -> None:
    keep(records, verdict())
    keep(records, verdict(passed=False))
    assert find_check(records, "tiny", "1", "d", "onnxruntime", "float32") is None
    keep(records, verdict())
    assert find_check(records, "tiny", "1", "d", "onnxruntime", "float32") is not None


@pytest.mark.parametrize(
    ("precision", "difference", "agreement", "passes"),
    [
        ("float32", 1e-3, 0.9, True),
        ("float32", 1.1e-3, 1.0, False),
        ("bfloat16", 1e-2, 0.999, True),
        ("bfloat16", 1.1e-2, 1.0, False),
        ("bfloat16", 1e-3, 0.9989, False),
        ("bfloat16", float("nan"), 1.0, False),
    ],
)
def test_the_verdict_is_what_the_limits_say(precision: str, difference: float, agreement: float, passes: bool) -> None:
    check = EngineCheck(
        engine="openvino",
        precision=precision,
        source="calibration",
        images=1000,
        max_difference=difference,
        agreement=agreement,
    )
    assert (judge(check) is None) == passes


@pytest.mark.parametrize(("changed", "images", "bound"), [(0, 120, 0.02466), (1, 1000, 0.004735), (3, 10, 0.60662)])
def test_how_often_a_label_may_change_elsewhere_is_clopper_and_pearson_s_bound(
    changed: int, images: int, bound: float
) -> None:
    check = verdict().check.model_copy(update={"images": images, "agreement": 1 - changed / images})
    assert disagreement_bound(check) == pytest.approx(bound, rel=1e-3)
    assert disagreement_bound(check.model_copy(update={"agreement": 0.0})) == 1.0


def test_an_engine_without_its_package_has_no_version() -> None:
    with pytest.raises(InvalidRequest, match="abacus is not installed"):
        engine_version("abacus")


def test_a_comparison_finds_the_largest_difference_and_the_changed_label(tmp_path: Path) -> None:
    network: Network = tiny_network(tmp_path)
    expected = network.run(images(10)).probabilities
    changed = expected.copy()
    changed[3] = changed[3][::-1]
    difference, agreement = compare(expected, changed)
    assert difference == pytest.approx(abs(float(expected[3, 0] - expected[3, 1])))
    assert agreement == 0.9
