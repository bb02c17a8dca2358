"""What a sweep itself says in MLflow; a test compares this with what one says.

The guard leaves these words alone when a video is called like one of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args, get_origin

from qafe import config
from qafe.dotted import flatten

CHOICES = [str(choice) for kind in vars(config).values() if get_origin(kind) is Literal for choice in get_args(kind)]
"""Values of settings."""
OWN_NAMES = """
spearman_low spearman_high pearson mae train_loss lr epoch_s clips_per_s peak_memory_mb best_spearman best_mae
test_spearman luck_threshold luck_p_value trials system/cpu_utilization_percentage
system/system_memory_usage_megabytes system/system_memory_usage_percentage system/gpu_0_utilization_percentage
system/gpu_0_memory_usage_megabytes system/gpu_0_memory_usage_percentage study seed sampler scheduler cpus_per_trial
gpus_per_trial data_digest expressions objectives warm_start params seconds maximize minimize tpe gp cmaes random qmc
grid asha hyperband median none mean sum True False None nan fusion_search heatmap_search optimiser_search
paper_baseline seed_noise baseline search finished pruned failed killed lost data memory diverged qafe.sweep_id
qafe.trial qafe.state qafe.reason qafe.host qafe.gpu qafe.note qafe.study_file qafe.study_sha256 qafe.stage qafe.fold
qafe.seed qafe.expression qafe.data_digest qafe.split_digest qafe.checkpoint qafe.identifiable
mlflow.source.git.commit mlflow.source.git.dirty version.torch version.python version.numpy version.ray version.optuna
version.mlflow version.qafe-net training validation test config.json predictions.csv failure.txt report.html
best_trials.csv importances.json summary.json study.py source.diff checkpoint/ figures/predicted_against_true.png
figures/spearman_over_epochs.png figures/confusion.png figures/residuals_per_patient.png figures/example_heatmap.png
figures/fusion_attention.png expression clip patient target prediction trial state epoch epochs pareto qafe.config
validation_spearman fusion.layers.blocks.shared.attention.norm_query norm_value norm_mlp key value out
fusion.mixer.conv fusion.position_heatmap fusion.position_rgb fusion.unused_norm fusion.gate.project fusion.weigh
head.layers.weight bias batches running_mean running_var num_batches_tracked spatial.stages.stem
spatial.transformer.layers.qkv.expand.contract temporal.class_token temporal.position heatmap.stem.conv.bn
heatmap.stages.reduce.spatial.shortcut downsample layer1 layer2 layer3 layer4 conv1 conv2 bn1 bn2 attention_norm
mlp_norm project_rgb project_heatmap tokens
"""
"""Of numbers, params, tags, states, studies, files, columns, and tensors of weights."""
OWN_LINES = """Spearman [band: 95 % at the best epoch, clips
(patients resampled)
true severity
predicted severity, rounded
predicted minus true severity
validation Spearman
training loss
100% exact
a row for each validation patient
a dot for each clip, a line at the median
segment; h: heatmap, r: RGB
layer 1: rgb reads heatmap segment
both pool segment
a drawn face, no patient's: all points, jet, sigma 1 px, window 5 px, blur 7 px
canvas of 256 px, which the encoder gets at 56 px
stopped early after epoch
the sweep's time budget was spent
its sweep ended without it"""
"""Words in figures, and reasons."""
OWN = (*flatten(config.Config()), *CHOICES, *config.PRESETS, *OWN_NAMES.split(), *OWN_LINES.splitlines())
"""What a sweep itself says."""


def own_words(expressions: Iterable[str]) -> tuple[str, ...]:
    """What a sweep of these expressions says."""
    of_each = ("spearman_{0}_low", "spearman_{0}_high", "checkpoint/{0}.safetensors", "{0}, validation", "{0}: ")
    return (*OWN, *(way.format(expression) for expression in expressions for way in of_each))
