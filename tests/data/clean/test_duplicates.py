"""Which of several similar documents stays."""

from megatron_qwen.data.clean.duplicates import NearDuplicates, signature


def test_a_document_is_compared_with_those_that_were_kept():
    """The third is as near to the second as the second to the first, but the second was dropped.

    Of 1,000 words each, neighbours share 800: 796 of 1,196 shingles of five words, a similarity of 0.67. The outer two
    share 600: 596 of 1,396, a similarity of 0.43.
    """
    words = [f"word{number}" for number in range(1400)]
    first, second, third = (signature(" ".join(words[start : start + 1000])) for start in (0, 200, 400))
    index = NearDuplicates(0.55)
    assert [index.is_new(document) for document in (first, second, third)] == [True, False, True]
