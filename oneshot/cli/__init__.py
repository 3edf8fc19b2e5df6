"""The command line, ``python -m oneshot``: what a network, or every choice of a search space, costs.

``cost`` writes a report as text, or as JSON of this form:

    {"format": "oneshot-cost", "version": 1,
     "model": "search_spaces.mobilenet:proxylessnas", "hardware": "pixel1.yaml" or null,
     "input": [{"shape": [1, 3, 224, 224], "dtype": "float32"}], "architectures": 217678233600000000,
     "costs": {"macs": {"unit": "MAC", "fixed": 1.0, "minimum": 3.0, "maximum": 9.0, "largest_is_found": false,
                        "choices": {"block1": {"k3e3": 2.0, "skip": 0.0}},
                        "joint": [{"when": {"block1": ["k3e3"], "block2": ["k3e3", "k5e3"]}, "value": 6.0}],
                        "layers": [{"path": "stem", "when": {}, "value": 1.0}]}},
     "notes": ["..."]}

A cost is ``fixed``, plus ``choices[label][option]`` of what each label is decided for, plus the ``value`` of every
``joint`` entry whose ``when`` holds: all its labels are decided for one of the options named. ``layers`` say the same
module by module, and are null with ``--no-layers``. The four are null for ``peak_memory``, which does not add up.
``largest_is_found``: ``maximum`` is the largest one that was found, and there may be a larger one.
"""

from .command_line import main as main
