"""The tests find faults: each line of the table is put into a copy of the repository, and its test must fail there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COPIED = ("fairref", "tests", "train.py", "sample.py", "setup.cfg", "pyproject.toml", "README.md", "docs")
LINKED = ("weights",)

# what tests stand in
PROCESSES = "tests/test_processes.py"
ADAPTERS = "tests/generation/test_adapters.py"
IMPORTS = "tests/exchange/test_import.py"
EXPORTS = "tests/exchange/test_export.py"
STREAMS = "tests/training/test_streams.py"
LOOP = "tests/training/test_loop.py"
TERMS = "tests/training/test_terms.py"
OWN_LOSSES = "tests/training/test_own_losses.py"
RESUME = "tests/training/test_resume.py"
TRANSPORT = "tests/fairness/test_transport.py"
STAGES = "tests/judges/test_mtcnn.py"
KEPT = "tests/evaluation/test_kept.py"
CONFUSIONS = "tests/evaluation/test_confusion.py"
SURE = "tests/evaluation/test_certainty.py"
FORCES = "tests/tools/test_balance.py"
ERRING = "tests/evaluation/test_judge_errors.py"
# and what is faulty
GROUP = "fairref/processes.py"
STEP = "fairref/training/step.py"
UPDATE = "fairref/training/loop.py"
CHECKPOINTS = "fairref/training/checkpoints.py"
FILES = "fairref/files/weights.py"
LOSS = "fairref/training/terms.py"
OWN_LOSS = "fairref/training/own_losses.py"
VALIDATION = "fairref/training/validation.py"
MTCNN = "fairref/judges/mtcnn.py"
SOLVER = "fairref/fairness/transport.py"
GAPS = "fairref/evaluation/gaps.py"
FAIR = "fairref/evaluation/fair.py"
JUDGE_ERRORS = "fairref/evaluation/judge_errors.py"
CONFUSION = "fairref/evaluation/confusion.py"
JUDGING = "fairref/evaluation/judging.py"
ZERO_SHOT = "fairref/bundle/zero_shot.py"
BALANCE = "fairref/tools/balance.py"

BY_HAND = f"{LOOP}::test_updates_are_adamw_by_hand"
LITERAL = f"{LOOP}::test_a_published_gradient_is_autograd_through_its_literal_algorithm"
KEYS = f"{STREAMS}::test_no_two_draws_of_a_run_have_the_same_key"
CASES = f"{TERMS}::test_an_iteration_with_faces_is_the_method_case_by_case"
WEIGHTS = f"{TERMS}::test_each_attribute_has_its_own_weights_in_and_outside_the_face"
GATHERED = f"{PROCESSES}::test_two_processes_gather_rows_in_the_images_order_and_add_up"
AS_ONE = f"{PROCESSES}::test_an_iteration_of_two_processes_is_that_of_one"
VALIDATED = f"{PROCESSES}::test_two_processes_validate_as_one_does"
OWN_GRADIENT = f"{OWN_LOSSES}::test_its_gradient_is_its_own_through_algorithm_A1[None-0]"
STATE = f"{LOOP}::test_all_numbers_of_a_state_come_back_from_its_checkpoint"
UNUSABLE = f"{LOOP}::test_unusable_gradients_in_a_row_end_a_run_also_across_a_resume"
RULE_OF_3 = f"{TRANSPORT}::test_a_class_that_was_drawn_never_or_always_has_the_error_of_the_rule_of_three"

FAULTS = {  # name -> (file, its text, the fault, the test that shall fail)
    # the loss
    "lambda_3 is read from lambda_2": (
        LOSS,
        "losses.region_factors(view.agrees, recipe.lambda_3)",
        "losses.region_factors(view.agrees, recipe.lambda_2)",
        f"{CASES}[original]",
    ),
    "lambda_3 is read from lambda_2, with two attributes": (
        LOSS,
        "losses.region_factors(view.agrees, recipe.lambda_3)",
        "losses.region_factors(view.agrees, recipe.lambda_2)",
        WEIGHTS,
    ),
    "lambda_2 is read from lambda_3": (
        LOSS,
        "share for name, share in recipe.lambda_2.items()}",
        "share for name, share in recipe.lambda_3.items()}",
        WEIGHTS,
    ),
    "the least confidence of an original is .8": (
        LOSS,
        "MIN_ORIGINAL_CONFIDENCE = 0.9 ",
        "MIN_ORIGINAL_CONFIDENCE = 0.8 ",
        f"{TERMS}::test_the_classifier_is_sure_of_an_original_from_nine_tenths_on",
    ),
    "the least confidence of an original is .91": (
        LOSS,
        "MIN_ORIGINAL_CONFIDENCE = 0.9 ",
        "MIN_ORIGINAL_CONFIDENCE = 0.91 ",
        f"{TERMS}::test_the_classifier_is_sure_of_an_original_from_nine_tenths_on",
    ),
    "a term counts without its weight": (
        LOSS,
        "sum((weight * values).sum() for",
        "sum(values.sum() for",
        f"{TERMS}::test_the_loss_is_the_tables_terms_in_its_order_and_a_run_without_one_lacks_its_metric",
    ),
    "L_text reads the empty prompt": (
        LOSS,
        "clip_tokenizer([view.task.prompt])",
        'clip_tokenizer([""])',
        f"{TERMS}::test_L_text_is_the_distance_in_clip_of_an_image_and_its_prompt[None]",
    ),
    "a part that a term needs is not asked for": (
        "fairref/training/checks.py",
        "if not setup.bundle.has(part):",
        "if False:",
        f"{TERMS}::test_a_bundle_without_a_part_that_a_term_needs_is_refused",
    ),
    # a user's own losses
    "an own loss counts outside its mask": (
        OWN_LOSS,
        "return values.where(mask.to(values.device), 0)",
        "return values",
        OWN_GRADIENT,
    ),
    "an own loss has no weight": (LOSS, "batch, own.weight", "batch, 1.0", OWN_GRADIENT),
    "an own loss gets the image for its original": (
        LOSS,
        "own(view.x, view.pair.o.clone(),",
        "own(view.x, view.x.clone(),",
        OWN_GRADIENT,
    ),
    "the adapter of the largest loss is kept": (
        VALIDATION,
        "measured[of] < best[of]",
        "measured[of] > best[of]",
        f"{OWN_LOSSES}::test_a_run_keeps_the_adapter_of_the_least_loss",
    ),
    "a file that has changed goes on": (
        "fairref/training/stored.py",
        "sha256_of(path) != sha256",
        "False",
        f"{OWN_LOSSES}::test_settings_keep_which_file_it_was_and_resume_wants_the_same",
    ),
    # the optimizer
    "the schedule of the rate is off": (UPDATE, 'group["lr"] = learning_rate(', "_ = (", BY_HAND),
    "the rate follows the updates": (
        UPDATE,
        'group["lr"] = learning_rate(recipe, state.iteration)',
        'group["lr"] = learning_rate(recipe, state.updates)',
        BY_HAND,
    ),
    "a short gradient is lengthened": (
        UPDATE,
        "min(1.0, recipe.clip / (norm + 1e-12))",
        "recipe.clip / (norm + 1e-12)",
        BY_HAND,
    ),
    "clip 0 makes the gradient 0": (UPDATE, " if recipe.clip else 1.0", "", BY_HAND),
    "the moving average has no smaller decay at first": (
        UPDATE,
        "min(recipe.ema, (1 + state.updates) / (10 + state.updates))",
        "recipe.ema",
        BY_HAND,
    ),
    # what holds a run back
    "a pull has the other sign": (
        BALANCE,
        "row = [-float(g",
        "row = [float(g",
        f"{FORCES}::test_a_pull_is_how_fast_the_log_odds_change_along_the_term",
    ),
    "a batch's own noise pulls on it": (
        BALANCE,
        "(n - 1) if k == own else total / n",
        "(n - 1) if False else total / n",
        f"{FORCES}::test_a_report_by_hand",
    ),
    # resuming
    "after a skipped gradient Adam counts the iterations": (
        CHECKPOINTS,
        "torch.tensor(float(state.updates))",
        "torch.tensor(float(state.iteration))",
        f"{BY_HAND}[2.0-resumed after each]",
    ),
    "the count of unusable gradients is lost": (CHECKPOINTS, ', "streak", "unusable")', ', "streak")', STATE),
    "the count of unusable gradients starts again at a resume": (
        CHECKPOINTS,
        ', "streak", "unusable")',
        ', "streak")',
        UNUSABLE,
    ),
    "a usable gradient doesn't start the count again": (
        UPDATE,
        "state.unusable = 0 if finite else state.unusable + 1",
        "state.unusable += not finite",
        UNUSABLE,
    ),
    "a file's data may be others than were written": (
        FILES,
        "digest is not None and digest != _digest(tensors, info)",
        "False",
        f"{RESUME}::test_no_flipped_bit_of_300_goes_unnoticed[checkpoint]",
    ),
    "a file's metadata may be written in another way": (
        FILES,
        " or text != _canonical(content)",
        "",
        f"{RESUME}::test_no_flipped_bit_of_300_goes_unnoticed[adapter]",
    ),
    "a run goes on with other weights": (
        "fairref/training/run.py",
        "refuse_another(stored, bundle)",
        "pass",
        f"{RESUME}::test_moved_weights_are_taken_and_remembered",
    ),
    "what is broken stays the newest": (
        CHECKPOINTS,
        "files[: max(n - keep, 0)] + files[n:]",
        "files[: max(n - keep, 0)]",
        f"{RESUME}::test_what_is_broken_and_newer_goes_with_the_next_checkpoint",
    ),
    "metrics are known by their place": (
        CHECKPOINTS,
        """lines[json.loads(line.decode())["iteration"]] = line""",
        "lines[len(lines)] = line",
        f"{RESUME}::test_a_run_goes_on_without_lost_lines_and_says_so",
    ),
    # random numbers
    "noise is keyed by a sum": (
        "fairref/diffusion/sampler.py",
        "(seed, iteration, int(n))",
        "(seed, iteration + int(n))",
        "tests/diffusion/test_sampler.py::test_noise_has_a_key_of_three_numbers_and_no_sum_of_them",
    ),
    "the steps of the gradient are the same in all iterations": (
        STEP,
        "draws(setup.recipe.seed, GRAD_STEPS, i).random()",
        "draws(setup.recipe.seed, GRAD_STEPS, 0).random()",
        f"{STREAMS}::test_what_an_iteration_draws_follows_from_the_seed_and_the_iteration",
    ),
    "the steps of the gradient are the same in all runs": (
        STEP,
        "draws(setup.recipe.seed, GRAD_STEPS, i)).double()",
        "draws(0, GRAD_STEPS, i)).double()",
        KEYS,
    ),
    "a run stops at the same step in all iterations": (
        STEP,
        "draws(recipe.seed, STOP, i)",
        "draws(recipe.seed, STOP, 0)",
        KEYS,
    ),
    "a step of the coupled gradient that is not kept is kept": (
        STEP,
        "return kept *",
        "return (torch.ones(len(kept)) if mode.coupling else kept) *",
        f"{LITERAL}[last:2-zero]",
    ),
    "a step of the adjusted gradient that is not kept is kept": (
        STEP,
        "return kept *",
        "return (kept if mode.coupling else torch.ones(len(kept))) *",
        f"{LITERAL}[drtune:2-sigma_min]",
    ),
    "a drawn term is another image's": (
        STEP,
        "terms[rows.start : rows.stop]",
        "terms[: len(rows)]",
        f"{PROCESSES}::test_an_iteration_of_two_processes_is_that_of_one",
    ),
    "EXPLICIT is ORDER": (
        STEP,
        "EXPLICIT, GUIDANCE, TRANSPORT, STOP = 1, 2, 3, 4, 5, 6, 7",
        "EXPLICIT, GUIDANCE, TRANSPORT, STOP = 1, 2, 3, 1, 5, 6, 7",
        KEYS,
    ),
    "prompts that name a class come in the others' order": (
        STEP,
        "EXPLICIT, GUIDANCE, TRANSPORT, STOP = 1, 2, 3, 4, 5, 6, 7",
        "EXPLICIT, GUIDANCE, TRANSPORT, STOP = 1, 2, 3, 1, 5, 6, 7",
        f"{STREAMS}::test_prompts_that_name_a_class_come_in_an_order_of_their_own",
    ),
    "TRANSPORT is STEPS": (
        STEP,
        "EXPLICIT, GUIDANCE, TRANSPORT, STOP = 1, 2, 3, 4, 5, 6, 7",
        "EXPLICIT, GUIDANCE, TRANSPORT, STOP = 1, 2, 3, 4, 5, 2, 7",
        KEYS,
    ),
    "targets are drawn alike in all iterations": (
        STEP,
        "rng, cost = draws(setup.recipe.seed, TRANSPORT, i)",
        "rng, cost = draws(setup.recipe.seed, TRANSPORT, 0)",
        f"{STREAMS}::test_the_error_of_drawn_targets_averages_out_over_iterations",
    ),
    "a class that was never drawn has no error": (SOLVER, "3 / M, stderr))", "0 / M, stderr))", RULE_OF_3),
    "a class that the target rules out has an error": (
        SOLVER,
        "np.where(exact, 0, ",
        "np.where(False, 0, ",
        f"{TRANSPORT}::test_the_rule_of_three_may_ask_for_more_draws_and_leaves_what_is_certain_alone",
    ),
    # adapters
    "a whole matrix has strength 1 always": (
        "fairref/generation/adapters.py",
        "layer.weight, strength)",
        "layer.weight, 1.0)",
        f"{ADAPTERS}::test_strengths_of_several_multiply_what_each_adds_to_the_weights[0.5]",
    ),
    "one strength counts for the first LoRA only": (
        "fairref/generation/strengths.py",
        "1.0 if adapter.soft else strengths[0] for",
        "1.0 if adapter is not adapters[0] else strengths[0] for",
        f"{ADAPTERS}::test_which_strength_counts_for_which_adapter[names1-strengths1-expected1]",
    ),
    "an adapted network is a base of its own": (
        "fairref/generation/adapters.py",
        "fingerprint_of(getattr(bundle, part))",
        "fingerprint_of(changed[part]) + part",
        f"{ADAPTERS}::test_all_of_several_are_held_against_the_base_itself",
    ),
    "the empty prompt's padding sees itself": (
        "fairref/generation/padding.py",
        "seen = layer.self_attn, layer.layer_norm1(text)",
        "seen = layer.self_attn, layer.layer_norm1(torch.cat([text, rest], 1))",
        "tests/generation/test_padding.py::test_own_padding_is_that_of_transformers_with_a_mask[]",
    ),
    "PEFT's patterns of alpha are not read": (
        "fairref/exchange/dialects.py",
        "alpha = patterns.get(own, config",
        "alpha = {}.get(own, config",
        f"{IMPORTS}::test_diffusers_as_diffusers_writes_it[True]",
    ),
    "kohya's alpha is not divided by the rank": (
        "fairref/exchange/dialects.py",
        "return float(alpha) / rank",
        "return float(alpha) / 2",
        f"{IMPORTS}::test_kohya[names1-5.0]",
    ),
    "a LoRA for web UIs has alpha 1": (
        "fairref/exchange/layouts.py",
        "torch.tensor(float(len(down)))",
        "torch.tensor(1.0)",
        f"{EXPORTS}::test_names_and_headers",
    ),
    "a merged model has twice the change": (
        "fairref/exchange/export.py",
        "weight.double() + product",
        "weight.double() + 2 * product",
        f"{EXPORTS}::test_diffusers_draws_what_sample_draws[both-merged-False]",
    ),
    "an upsampler of a single file stands where the attention is": (
        "fairref/exchange/layouts.py",
        '("2" if attends',
        '("1" if attends',
        f"{EXPORTS}::test_names_and_headers",
    ),
    "the check takes any value": (
        "fairref/exchange/canary.py",
        "SHARE = 0.1",
        "SHARE = 100",
        f"{EXPORTS}::test_the_check_notices_other_weights[text_encoder-diffusers-False]",
    ),
    # what judges see
    "a crop's box is floored": (
        "fairref/fairness/faces.py",
        "faces.boxes.round()",
        "faces.boxes.floor()",
        "tests/fairness/test_faces.py::test_the_sides_of_a_crop_go_to_the_nearest_pixels",
    ),
    "a soft token may start as BOS": (
        "fairref/generation/lora.py",
        "if i not in (tokenizer.bos, tokenizer.eos)",
        "if i not in (tokenizer.eos,)",
        "tests/generation/test_adapters.py::test_a_soft_token_starts_as_any_token_but_bos_and_eos",
    ),
    "MTCNN's last suppression goes by the union": (
        MTCNN,
        "suppress(boxes, score, image, OVERLAP, of_smaller=True)",
        "suppress(boxes, score, image, OVERLAP)",
        f"{STAGES}::test_the_second_network_goes_by_the_union_and_the_last_by_the_smaller_box",
    ),
    "MTCNN's first suppression goes by the limit of the others": (
        MTCNN,
        "suppress(boxes, score, image, OVERLAP_IN_SCALE)",
        "suppress(boxes, score, image, OVERLAP)",
        f"{STAGES}::test_the_first_network_goes_by_the_union_at_a_half_in_one_scale_and_seven_tenths_across",
    ),
    # judges and their errors
    "true and judged classes are swapped": (
        CONFUSION,
        "(truth[truth >= 0], judged[truth >= 0])",
        "(judged[truth >= 0], truth[truth >= 0])",
        f"{CONFUSIONS}::test_counts_of_true_and_judged_classes",
    ),
    "an image counts without the template judge's word": (
        CONFUSION,
        "== k, k, -1)",
        ">= -1, k, -1)",
        f"{CONFUSIONS}::test_explicit_prompts_count_where_the_template_judge_confirms_the_class",
    ),
    "a judge errs alike where its errors differ": (
        CONFUSION,
        "swapped >= seen - 1e-9",
        "swapped <= seen + 1e-9",
        f"{CONFUSIONS}::test_whether_a_judge_errs_alike_before_and_after[9-2]",
    ),
    "CLIP's logits are cosines times the logarithm of their scale": (
        ZERO_SHOT,
        ".to(cosines).exp()",
        ".to(cosines)",
        "tests/bundle/test_zero_shot.py::test_its_logits_are_those_of_transformers",
    ),
    "the second judge is the first again": (
        JUDGING,
        "of_judge.setdefault(place, [])",
        "of_judge.setdefault(knowing[0], [])",
        "tests/evaluation/test_evaluate.py::test_several_classifiers_judge_as_each_does_alone",
    ),
    # how sure numbers are
    "a squared gap keeps its bias": (
        GAPS,
        "np.square(d).sum(-1) - trace)",
        "np.square(d).sum(-1))",
        f"{SURE}::test_the_squared_gap_is_unbiased_and_its_variance_is_known",
    ),
    "the variance of shares is over n": (
        GAPS,
        "share_covariance(shares, n - 1)",
        "share_covariance(shares, n)",
        f"{SURE}::test_the_squared_gap_of_two_classes_as_it_is_printed",
    ),
    "an interval is as wide as the measured gap's noise": (
        GAPS,
        "(seen, middle - half, middle + half)",
        "(seen, seen - half, seen + half)",
        f"{SURE}::test_the_score_interval_ends_where_a_gaps_own_noise_reaches_the_measured_one",
    ),
    "fair is equal shares whatever was aimed at": (
        FAIR,
        "expected = counts.sum(1, keepdims=True) * target",
        "expected = counts.sum(1, keepdims=True) / len(target)",
        f"{SURE}::test_the_statistic_of_fair_is_chi_squared_under_it",
    ),
    "M is transposed": (
        JUDGE_ERRORS,
        "np.swapaxes(labelled, -1, -2) + added",
        "labelled + added",
        f"{ERRING}::test_M_has_a_column_for_each_true_class",
    ),
    "M's noise is that of its rows": (
        JUDGE_ERRORS,
        "counts = labelled + ADDED_TO_NOISE",
        "counts = np.swapaxes(labelled, -1, -2) + ADDED_TO_NOISE",
        f"{ERRING}::test_its_covariance_is_that_of_drawn_judges_and_images",
    ),
    "what no shares explain has an interval": (
        JUDGE_ERRORS,
        "elif not is_explained(of_class, labelled, value)",
        "elif not is_explained(of_class, labelled, value) and False",
        f"{ERRING}::test_where_no_shares_explain_the_counts_there_is_no_interval",
    ),
    "M's error is each prompt's own": (
        JUDGE_ERRORS,
        "alone=gap.alone + alone",
        "alone=gap.alone + alone / P",
        f"{ERRING}::test_near_the_target_the_corrected_gap_scatters_by_what_a_fair_model_does",
    ),
    # several processes
    "rows are gathered in reverse": (
        GROUP,
        "whole[part.start : part.stop] =",
        "whole[N - part.stop : N - part.start] =",
        f"{GATHERED}[4]",
    ),
    "logits are gathered in reverse": (
        GROUP,
        "whole[part.start : part.stop] =",
        "whole[N - part.stop : N - part.start] =",
        f"{AS_ONE}[gradient-4]",
    ),
    "gathered rows are not reduced": (
        GROUP,
        "_together(dist.all_reduce, whole)",
        "whole",
        f"{GATHERED}[4]",
    ),
    "sums are not reduced": (GROUP, "_together(dist.all_reduce, flat)", "flat", f"{GATHERED}[5]"),
    "gradients are not reduced": (
        STEP,
        "setup.processes.total([*gradient, sums.to(gradient[0])])",
        "[*gradient, sums.to(gradient[0])]",
        f"{AS_ONE}[gradient-4]",
    ),
    "a validation's counts are not reduced": (
        VALIDATION,
        """counts, cosine, count = setup.processes.total(
            [torch.stack(counts), torch.cat(cosines).sum(), _count(self.originals)]
        )""",
        "counts, cosine, count = torch.stack(counts), torch.cat(cosines).sum(), _count(self.originals)",
        VALIDATED,
    ),
    "a validation compares each process's images with the first one's originals": (
        VALIDATION,
        "rows[mine.start : mine.stop]",
        "rows[: len(mine)]",
        VALIDATED,
    ),
    "what is kept does not know how it was drawn": (
        "fairref/evaluation/kept.py",
        '"drawing": drawing._asdict(),',
        '"drawing": {},',
        f"{KEPT}::test_what_is_kept_follows_from_all_that_draws_and_judges",
    ),
    "what is kept does not know the adapter's strength": (
        "fairref/generation/adapters.py",
        "made_of = (fingerprint(adapter.tensors), float(strength))",
        "made_of = (fingerprint(adapter.tensors), 1.0)",
        f"{KEPT}::test_what_is_kept_follows_from_all_that_draws_and_judges",
    ),
    "images that are missing begin anew": (
        "fairref/evaluation/judging.py",
        "of_some, images = list(some), range(n - few, n)",
        "of_some, images = list(some), range(few)",
        f"{KEPT}::test_what_is_judged_is_not_drawn_again_and_more_images_are_added",
    ),
    "images of prompts that are drawn together have the first prompt's noise": (
        "fairref/generation/drawing.py",
        "for prompt in prompts for _, z in fixed_noise(bundle, seed, prompt, images)",
        "for _ in prompts for _, z in fixed_noise(bundle, seed, prompts[0], images)",
        f"{KEPT}::test_prompts_of_few_images_are_drawn_together_and_judged_as_alone",
    ),
    "images of prompts that are drawn together change places": (
        "fairref/generation/drawing.py",
        ".repeat_interleave(len(images), 0)",
        ".repeat(len(images), 1, 1)",
        f"{KEPT}::test_prompts_of_few_images_are_drawn_together_and_judged_as_alone",
    ),
    "the last group of prompts is smaller": (
        "fairref/evaluation/judging.py",
        "texts + texts[:1] * (size - len(texts))",
        "texts",
        f"{KEPT}::test_prompts_of_few_images_are_drawn_together_and_judged_as_alone",
    ),
    "what chance does is never drawn": (
        "fairref/evaluation/fair.py",
        "if min(images) * min(target) >= FEW:",
        "if True:",
        f"{SURE}::test_where_few_images_are_expected_p_is_that_of_all_counts_that_there_can_be",
    ),
    "counts as far as those that are seen do not count": (
        "fairref/evaluation/fair.py",
        "statistic * (1 - 1e-9)",
        "statistic * (1 + 1e-9)",
        f"{SURE}::test_where_few_images_are_expected_p_is_that_of_all_counts_that_there_can_be",
    ),
    "the sum over prompts is one prompt's": (
        "fairref/evaluation/fair.py",
        "of_each[0] + sum(map(rng.permutation, of_each[1:]))",
        "of_each[0] * len(of_each)",
        f"{SURE}::test_where_few_images_are_expected_p_is_that_of_all_counts_that_there_can_be",
    ),
    "another run's adapter takes the place of the run's own": (
        "fairref/reporting/evaluated.py",
        '        and len({after.get("fingerprint"), own_after.get("fingerprint")} - {None}) < 2\n',
        "",
        "tests/reporting/test_report.py::test_an_evaluation_of_another_runs_adapter_stands_beside_the_runs_own",
    ),
    "a few labels by hand take the intervals away": (
        "fairref/evaluation/parts.py",
        "return 0 if fewest >= MIN_LABELLED else 1 if fewest else 2",
        "return 1 if fewest else 2",
        "tests/evaluation/test_confusion.py::test_the_confusion_that_says_most_stands_first",
    ),
    "a target in decimals stays a millionth off": (
        "fairref/fairness/attributes.py",
        "if abs(sum(target) - 1) > ROUNDING:",
        "if False:",
        "tests/fairness/test_attributes.py::test_a_target_in_decimals_is_its_fraction_wherever_it_is_used",
    ),
    "every flip is needless": (
        "fairref/evaluation/statistics.py",
        "needless = (changed - least) / images",
        "needless = changed / images",
        "tests/evaluation/test_evaluate.py::test_flips_that_no_count_asked_for",
    ),
    "all processes draw the same images": (
        STEP,
        "first_noise(setup.bundle, recipe.seed, i, setup.processes.part(recipe.batch))",
        "first_noise(setup.bundle, recipe.seed, i, range(len(setup.processes.part(recipe.batch))))",
        f"{AS_ONE}[images-4]",
    ),
    "all processes learn from process 0's targets": (
        STEP,
        "of_all[rows.start : rows.stop]",
        "of_all[: len(rows)]",
        f"{AS_ONE}[gradient-4]",
    ),
    "each process draws its own targets": (
        STEP,
        "rng, cost = draws(setup.recipe.seed, TRANSPORT, i)",
        "rng, cost = draws(setup.recipe.seed, TRANSPORT + setup.processes.rank, i)",
        f"{AS_ONE}[q-5]",
    ),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository, without what Python compiled: two faults of one length and second would look the same to it."""
    folder = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name, target_is_directory=True)
    return folder


def run(copy, *nodes):
    """pytest's exit code (0: passed, 1: failed) and last line, of tests in the default suite of the copy."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "-p", "no:cacheprovider", *nodes]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    return done.returncode, (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]


@pytest.mark.slow
def test_without_a_fault_the_tests_pass(copy):
    """All of them, and none is left out as slow."""
    code, said = run(copy, *sorted({node for *_, node in FAULTS.values()}))
    assert code == 0 and " passed" in said and not {"deselected", "skipped"} & set(said.split()), said


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FAULTS)[:: int(os.environ.get("FAULTS_EVERY", "1"))])
def test_a_fault_is_found(copy, name):
    source, text, fault, node = FAULTS[name]
    path = copy / source
    whole = path.read_text(encoding="utf-8")
    assert whole.count(text) == 1, f"{source} has {text!r} {whole.count(text)} times"
    path.write_text(whole.replace(text, fault), encoding="utf-8")
    try:
        code, said = run(copy, node)
    finally:
        path.write_text(whole, encoding="utf-8")
    assert code == 1 and " failed" in said and " error" not in said, said


def test_the_table_fits_the_repository():
    """Each text stands in its file once, so that a move of a file shows at once; and its test exists."""
    for name, (source, text, fault, node) in FAULTS.items():
        assert (ROOT / source).read_text(encoding="utf-8").count(text) == 1 and fault != text, name
        file, _, test = node.partition("::")
        assert f"def {test.partition('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8"), name
