"""The null device itself: it says what a card would be asked to do, and is no more than that."""

H100_BYTES = 85_017_493_504


def test_torch_sees_one_h100(probe):
    found = probe("devices")
    assert (found["count"], found["name"]) == (1, "NVIDIA H100 80GB HBM3")
    assert found["bytes"] == found["driver sees"] == H100_BYTES
    assert found["capability"] == [9, 0]


def test_a_launch_is_a_line_with_the_kernels_name(probe):
    found = probe("kernel")
    assert found["launches"] == {"KERNEL": 1, "GEMM": 1}
    assert any("exp_kernel_cuda" in name for name in found["kernels"])
    assert found["waits"] == []


def test_each_way_to_wait_for_the_device_is_seen_and_nothing_else(probe):
    found = probe("waits")
    free = {name for name, count in found.items() if not count}
    assert free == {"from pinned memory", "an op"}


def test_copies_are_done_and_kernels_are_not(probe):
    found = probe("values")
    assert found["there and back"] == [1.0, 2.0, 3.0]
    assert found["doubled"] != [2.0, 4.0, 6.0]


def test_memory_is_that_of_a_card(probe):
    found = probe("memory")
    assert found["allocated"] >= 60 * 10**9
    assert found["free"] <= H100_BYTES - 60 * 10**9
    assert "out of memory" in found["error"]


def test_convolutions_run_through_cudnn(probe):
    found = probe("convolution")
    backward = {"convolution_backward_data", "convolution_backward_filter"}
    for dims in ("1d", "2d"):
        assert found["launches"][dims][0] == "convolution_forward"
        assert set(found["launches"][dims][1:]) == backward
    assert found["missing"] == []


def test_a_graph_is_captured_and_replayed_as_one_launch(probe):
    found = probe("capture")
    assert found["captures"] == ["CAPTURE begin", "CAPTURE end"]
    assert found["replay"] == {"GRAPH": 1}


def test_a_wait_breaks_a_capture(probe):
    found = probe("broken_capture")
    assert any(line.startswith("BROKEN capture") for line in found["captures"])
    assert "capturing" in found["error"] or "capture" in found["error"]
