"""What each source is good for: which are left out, held out, capped, and how."""

from typing import Final

# No usable harm label, or a truth label that only world knowledge could give.
UNUSED: Final = frozenset({"presidio_pii", "factscore_sentences"})

# Whole sources that nothing is trained on, in two fixed groups of like kinds: replies, prompts and
# posts, harmful and harmless texts in either. The first calibrates and chooses thresholds beside
# the sources that were trained on, since a model is surer of those than of what it will meet.
CALIBRATING: Final = frozenset(
    {
        "autoj_responses",  # long harmless replies
        "gab_hate_corpus",
        "jailjudge_mini",  # replies of attacked models, judged by people
        "multijail_en",  # harmful requests
        "truthfulqa",
    }
)
# The second is only reported. It has the one source of harmless requests.
UNSEEN: Final = frozenset(
    {
        "dices",  # conversations with a model, judged by about a hundred people each
        "or_bench_80k_sample",  # requests that look harmful and are not
        "sbic",
        "shadow_alignment",  # compliance with harmful requests
        "trustllm_privacy_queries",  # harmful requests
    }
)
LEFT_OUT: Final = CALIBRATING | UNSEEN

# Each positive row is of one category, so it says something of the other five.
ONE_CATEGORY: Final = frozenset({
    "ailuminate_demo", "catqa", "jailbreakbench", "jailbreakbench_goals", "multijail_en",
    "or_bench_toxic", "refusal_direction_jailbreak", "strongreject", "trustllm_privacy_queries",
    "hh_rlhf_harmless", "hh_rlhf_harmless_requests", "hh_rlhf_harmless_turns",
    "past_tense_replies",
})  # fmt: skip

# Good answers to ordinary questions: weak evidence that they say nothing false.
SOUND: Final = frozenset({
    "arena_hard", "autoj_responses", "biggen_references", "caia_safety", "coconot_contrast",
    "gpteacher_roleplay", "medquad", "med_safety_refusals", "refusal_direction_harmless",
    "star1_safe", "taskmaster", "wildbench_outputs",
})  # fmt: skip

# Long answers to ordinary or merely delicate questions: what must not be blocked.
LONG_HARMLESS: Final = frozenset({
    "arena_hard", "autoj_responses", "biggen_references", "coconot_contrast",
    "gpteacher_roleplay", "halueval_general", "medquad", "refusal_direction_harmless",
    "wildbench_outputs",
})  # fmt: skip

# Harmless requests and stories that look harmful.
LOOK_ALIKES: Final = frozenset({
    "caia_safety", "coconot_contrast", "cyberseceval_frr", "ethics_commonsense",
    "jailbreakbench_goals", "or_bench_80k_sample", "or_bench_hard", "own_lookalikes",
})  # fmt: skip

# Answers to hate, which quote or name what they speak against.
COUNTER_SPEECH: Final = frozenset({"gbv_counterspeech", "own_counterspeech"})

# Ordinary things to ask: the requests are harmless as the answers are.
ORDINARY: Final = frozenset({"arena_hard", "biggen_references", "gpteacher_roleplay"})

# Short answers of plain models to awkward, rude and ill-meant questions, with the questions, and
# answers to attacks, by labels of our own: whole in every mix, as nothing else is like them.
WHOLE: Final = frozenset({
    "hh_rlhf_harmless", "hh_rlhf_harmless_requests", "hh_rlhf_harmless_turns",
    "past_tense_replies",
})  # fmt: skip

# Our own texts in the plain words that people type and models answer in.
PLAIN: Final = frozenset({
    "own_plain_crime", "own_plain_people", "own_plain_conduct", "own_plain_more", "own_plain_long",
    "own_borderline", "own_jailbreak", "own_assistant", "own_plain_prompts", "own_prompts_more",
    "own_plain_posts", "own_tales", "own_comedy", "own_sober", "own_against_hate", "own_threads",
    "own_pairs_crime", "own_pairs_people", "own_pairs_life",
})  # fmt: skip

CAP: Final = 700  # rows a source
_OWN_CAP: Final = 250  # rows of a source of our own texts; twice as many of one in PLAIN
CAPS: Final = {
    # Replies: the texts that the worker judges.
    "arena_hard": 1000,
    "coconot_contrast": 1400,
    "diasafety": 1500,
    "gptfuzz": 1300,
    "hh_rlhf_harmless": 4000,
    "hh_rlhf_harmless_requests": 4000,
    "hh_rlhf_harmless_turns": 2500,
    "halueval_general": 1000,
    "jailbreakbench": 1600,
    "just_eval_safety": 900,
    "medquad": 600,
    "past_tense_replies": 1300,
    "gpteacher_roleplay": 1000,
    "wildbench_outputs": 1400,
    # Look-alikes.
    "or_bench_hard": 1400,
    "caia_safety": 1000,
    # One idea in many rows.
    "bbq": 350,
    "convabuse": 600,
    "cyberseceval_interpreter": 300,
    "mmlu_sensitive": 500,
    "unintended_bias_templates": 400,
    "latent_jailbreak": 500,
    # Large and varied.
    "dynahate": 6000,
    "davidson": 1000,
    "hatemoji_build": 1500,
    "toxigen": 1500,
    "measuring_hate_speech": 1200,
    "constraint_covid": 1300,
    "rtp_perspective": 1800,
}


def cap(source: str) -> int:
    """Rows of a source that a mix takes at most."""
    if source.startswith("own_"):
        return _OWN_CAP * (2 if source in PLAIN else 1)
    return CAPS.get(source, CAP)
