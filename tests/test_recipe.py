from pathlib import Path

import pytest

import gateskip_compress as g
from gateskip_compress.recipe import write_steps

PIPELINES = Path(__file__).parents[1] / "pipelines"
RECIPES = sorted(PIPELINES.glob("*.yaml"))
DEMO = PIPELINES / "smollm2-135m.yaml"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_its_text_is_there(path):
    recipe = g.read_recipe(path)
    assert Path(recipe.evaluation.text).is_file()
    pipeline = recipe.pipeline()
    again = recipe.model_copy(update={"steps": write_steps(pipeline)})
    assert again.pipeline() == pipeline


def test_overrides():
    recipe = g.read_recipe(DEMO, ["gateskip.budget=0.77", "calibration.windows=8", "seed=5"])
    assert next(s for s in recipe.pipeline() if s.name == "gateskip").budget == 0.77
    assert (recipe.calibration.windows, recipe.seed) == (8, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("budget:", "bugdet:"), "gateskip has no field 'bugdet', did you mean 'budget'"),
        (("- gateskip:", "- gatskip:"), "unknown step 'gatskip', did you mean 'gateskip'"),
        (("evaluation:", "evalution:"), "unknown key 'evalution', did you mean 'evaluation'"),
        (("window_tokens: 512", "window_token: 512"), "did you mean 'window_tokens'"),
        (("bits: 4", "bits: 5"), r"quantize\.bits = 5"),
        (("draft_tokens: 8", "draft_budget: 0.95"), "lower draft_budget"),
        (("budget: 0.9", "budget: much"), r"gateskip\.budget = 'much'"),
        (("steps:", "steps: ["), "is not YAML"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_mistakes_are_named(change, message, tmp_path):
    text = DEMO.read_text()
    assert change[0] in text
    (tmp_path / "r.yaml").write_text(text.replace(*change, 1))
    with pytest.raises((g.PipelineError, ValueError), match=message):
        g.read_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("override", ["budget", "gateskp.budget=1"])
def test_overrides_that_match_nothing_are_refused(override):
    with pytest.raises(g.PipelineError, match="--set"):
        g.read_recipe(DEMO, [override])


def test_text_beside_the_recipe_is_found(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "r.yaml").write_text(
        "model: x\nevaluation: {text: a.txt}\ncalibration: {text: a.txt}\n"
        "training: {text: [a.txt, 'hf:name:train']}\nsteps: [prune: {blocks: 1}]\n"
    )
    recipe = g.read_recipe(tmp_path / "r.yaml")
    found = str(tmp_path / "a.txt")
    assert (recipe.evaluation.text, recipe.calibration.text) == (found, found)
    assert recipe.training.text == [found, "hf:name:train"]
    with pytest.raises(g.PipelineError, match=r"unknown key 'training\.promts', did you mean 'prompts'"):
        g.read_recipe(tmp_path / "r.yaml", ["training.promts=true"])
