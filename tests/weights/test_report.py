"""The line never claims more sharing than was counted."""

from mlx_edge.weights import LoadReport, PackReport, format_bytes


def test_line_of_a_copied_model():
    report = LoadReport(219, 10_500_000, 0, 10_500_000, 3e-4, 4e-4, 5.1e-3, reasons=("so",))
    assert str(report) == (
        "219 tensors, 10.5 MB: 0 B shared with the file, 10.5 MB copied (so); "
        "map 0.3 ms, parse 0.4 ms, copy 5.1 ms"
    )


def test_line_of_a_shared_model_says_that_pages_come_later():
    line = LoadReport(2, 4_100_000_000, 4_100_000_000, 0, convert_s=0.002).summary()
    assert "4.1 GB shared with the file, 0 B copied;" in line
    assert line.endswith(
        "view 0.0 ms, convert 2.0 ms; shared pages are read from disk at first use"
    )


def test_no_line_says_zero_copy():
    for report in (LoadReport(), LoadReport(1, 8, 4, 4), LoadReport(1, 8, 8, 0)):
        assert "zero" not in report.summary()


def test_combine_adds_and_keeps_each_reason_once():
    part = LoadReport(1, 10, 4, 6, 0.5, 0.25, 0.125, 1.0, reasons=("a",))
    total = LoadReport.combine([part, part, LoadReport(reasons=("b",))])
    assert total == LoadReport(2, 20, 8, 12, 1.0, 0.5, 0.25, 2.0, reasons=("a", "b"))
    assert LoadReport.combine([]) == LoadReport()


def test_packed_weights_are_told_apart_from_those_of_the_file():
    pack = PackReport(691_000_000, "/cache/x.pack", "reused", 0.0035)
    line = LoadReport(1, 8, 8, 0, packed=pack).summary()
    assert line.endswith("; repacked: 691.0 MB reused in /cache/x.pack, 3.5 ms")
    assert LoadReport.combine([LoadReport(), LoadReport(packed=pack)]).packed == pack
    assert "repacked" not in LoadReport(1, 8, 8, 0).summary()


def test_sizes():
    sizes = (0, 999, 1000, 1_550_000, 2 * 10**9)
    assert [format_bytes(n) for n in sizes] == ["0 B", "999 B", "1.0 kB", "1.6 MB", "2.0 GB"]
