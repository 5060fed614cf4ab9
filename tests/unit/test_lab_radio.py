"""The frame that follows an association."""

from apagent.lab.radio import layer2_update


def test_the_layer_2_update_frame() -> None:
    assert layer2_update("02:00:00:00:01:07").hex(" ") == (
        "ff ff ff ff ff ff 02 00 00 00 01 07 00 06 00 01 af 81 01 00"
    )
