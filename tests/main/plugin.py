"""A package of somebody else's, as pip would have installed it: code, configuration, entry points."""

import textwrap


def install(folder, name, source, **choices):
    """Writes package `name` into `folder`: strategies `recipe` functions by the names of `choices`, with their YAML.

    The variables that let a process find it.
    """
    package, information = folder / name, folder / f"{name}-1.0.dist-info"
    (package / "conf" / "strategy").mkdir(parents=True)
    information.mkdir()
    for file in (package / "__init__.py", package / "conf" / "__init__.py"):
        file.touch()
    (package / "strategies.py").write_text(textwrap.dedent(source))
    for choice, text in choices.items():
        (package / "conf" / "strategy" / f"{choice}.yaml").write_text(textwrap.dedent(text))
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        "[ftdist.strategies]\n"
        + "".join(f"{choice} = {name}.strategies:{choice}\n" for choice in choices)
        + f"[ftdist.conf]\n{name} = {name}.conf\n"
    )
    return {"PYTHONPATH": str(folder)}
