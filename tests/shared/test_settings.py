from pathlib import Path

import pytest
from medloop.auth import AuthSettings
from medloop.errors import InvalidRequest
from medloop.settings import ServerSettings, StorageSettings, find_home, mask_url, read_settings


def test_home_is_the_nearest_upwards(tmp_path: Path) -> None:
    (tmp_path / ".medloop").mkdir()
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert find_home(tmp_path / "a" / "b") == tmp_path / ".medloop"


def test_stores_default_to_the_home_folder(home: Path) -> None:
    settings = StorageSettings()
    assert settings.objects_url == (home / "objects").as_uri()
    assert settings.records_url == f"sqlite:///{home}/records.sqlite"


def test_the_environment_names_other_stores_and_a_repr_hides_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDLOOP_RECORDS_URL", "mongodb://user:secret@db/medloop")
    settings = StorageSettings()
    assert settings.records_url == "mongodb://user:secret@db/medloop"
    assert "secret" not in repr(settings)
    assert mask_url(settings.records_url) == "mongodb://db/medloop"


@pytest.mark.parametrize("password", ["secret", "se/cr?et", "se#cret", "secret@home"])
def test_a_masked_address_never_shows_the_password(password: str) -> None:
    masked = mask_url(f"mongodb://user:{password}@db:27017/medloop")
    assert masked == "mongodb://db:27017/medloop"


@pytest.mark.parametrize(
    ("variable", "value", "group", "said"),
    [
        ("MEDLOOP_PORT", "many", ServerSettings, "MEDLOOP_PORT is not set as it must be: "),
        ("MEDLOOP_AUTH", "none", AuthSettings, "MEDLOOP_AUTH is not set as it must be: choose "),
        ("MEDLOOP_LOG_LEVEL", "LOUD", ServerSettings, "MEDLOOP_LOG_LEVEL is not set as it must be: .*'WARNING'"),
        ("MEDLOOP_AUTH", "oidc", AuthSettings, "MEDLOOP_OIDC_ISSUER"),
        ("MEDLOOP_OBJECTS_SECONDS", "inf", StorageSettings, "MEDLOOP_OBJECTS_SECONDS is not set as it must be: "),
    ],
)
def test_a_setting_that_cannot_be_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, group: type, said: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidRequest, match=said):
        read_settings(group)


def test_a_log_level_may_be_in_small_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDLOOP_LOG_LEVEL", "warning")
    assert ServerSettings().log_level == "WARNING"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AWS_SECRET_ACCESS_KEY", "change-me"),
        ("MEDLOOP_API_KEY", "change-me"),
        ("MEDLOOP_RECORDS_URL", "mongodb://medloop:change-me@db/medloop"),
        ("MLFLOW_TRACKING_PASSWORD", "change-me"),
    ],
)
def test_a_secret_left_at_its_placeholder_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv("POSTGRES_PASSWORD", "change-me")  # not ours to read
    read_settings(ServerSettings)
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidRequest, match=rf"^{variable} still has the placeholder") as caught:
        read_settings(ServerSettings)
    assert "mongodb" not in caught.value.detail
