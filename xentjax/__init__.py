"""Cross-entropy losses for JAX: exact at any margin, the same everywhere, differentiable to any order."""

from xentjax._checked import checked as checked
from xentjax._linear import LinearPlan as LinearPlan
from xentjax._linear import fuse_linear as fuse_linear
from xentjax._linear import linear_softmax_cross_entropy as linear_softmax_cross_entropy
from xentjax._linear import plan_linear as plan_linear
from xentjax._reduction import WeightedSum as WeightedSum
from xentjax._reduction import weighted_mean as weighted_mean
from xentjax._reduction import weighted_sum as weighted_sum
from xentjax._sigmoid import asymmetric_loss as asymmetric_loss
from xentjax._sigmoid import sigmoid_cross_entropy as sigmoid_cross_entropy
from xentjax._sigmoid import sigmoid_focal_loss as sigmoid_focal_loss
from xentjax._softmax import RowStatistics as RowStatistics
from xentjax._softmax import row_statistics as row_statistics
from xentjax._softmax import softmax_cross_entropy as softmax_cross_entropy
from xentjax._softmax import softmax_cross_entropy_with_top_k_labels as softmax_cross_entropy_with_top_k_labels
from xentjax._softmax import softmax_focal_loss as softmax_focal_loss
from xentjax._softmax import softmax_log_prob as softmax_log_prob
