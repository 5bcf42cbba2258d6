"""Data and presentation of the omni-modal experiment: real digits, speech, videos, what is asked of them, what is shown."""
