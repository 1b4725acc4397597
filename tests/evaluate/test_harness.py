"""lm-evaluation-harness by its own library, where it is installed (the extra `lm_eval`)."""

import json

import pytest

TASK = """task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}} "
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_a_task_of_ones_own(model, tmp_path):
    pytest.importorskip("lm_eval")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ftdist.errors import UserError
    from ftdist.evaluate import harness

    rows = [{"q": "What is 1 plus 1?", "choices": ["two", "two"], "gold": 0}] * 2
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    (tmp_path / "task.yaml").write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    loaded = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    found = harness.run(*loaded, [str(tmp_path / "task.yaml")], 2)
    assert found["tiny_choice/acc"].total == 1.0  # both choices are alike: the first is taken
    with pytest.raises(UserError, match=r"eval\.lm_eval=.*no_such_task"):
        harness.run(*loaded, ["no_such_task"], 2)
