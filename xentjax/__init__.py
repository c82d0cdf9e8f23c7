"""Cross-entropy losses for JAX. They are accurate at any margin, share one set of conventions, and are differentiable to any order.

Each loss takes logits and labels, and returns one value per example. The most common functions are

    softmax_cross_entropy           one class of K
    sigmoid_cross_entropy           yes or no
    linear_softmax_cross_entropy    a linear layer and cross-entropy, without storing all logits
    fuse_linear                     the same for any other loss
    weighted_mean                   a mean with a mask or weights
    checked                         errors for bad labels and NaN

`dir(xentjax)` lists all functions, and `help(xentjax.softmax_cross_entropy)` explains one of them. The page
https://github.com/xentjax/xentjax/blob/main/docs/choosing-a-loss.md groups all functions by task.
"""

from xentjax import information as information
from xentjax import metrics as metrics
from xentjax import policy as policy
from xentjax import preference as preference
from xentjax import samplers as samplers
from xentjax import sequence as sequence
from xentjax._checked import checked as checked
from xentjax._contrastive.losses import clip_loss as clip_loss
from xentjax._contrastive.losses import info_nce as info_nce
from xentjax._contrastive.losses import nt_xent as nt_xent
from xentjax._contrastive.losses import siglip_loss as siglip_loss
from xentjax._contrastive.losses import supervised_contrastive_loss as supervised_contrastive_loss
from xentjax._linear.fused import fuse_linear as fuse_linear
from xentjax._linear.fused import linear_softmax_cross_entropy as linear_softmax_cross_entropy
from xentjax._linear.plan import LinearPlan as LinearPlan
from xentjax._linear.plan import plan_linear as plan_linear
from xentjax._linear.sharded import fuse_linear_sharded as fuse_linear_sharded
from xentjax._losses.detection import distribution_focal_loss as distribution_focal_loss
from xentjax._losses.detection import quality_focal_loss as quality_focal_loss
from xentjax._losses.detection import varifocal_loss as varifocal_loss
from xentjax._losses.distillation import distillation_loss as distillation_loss
from xentjax._losses.imbalance import class_balanced_weights as class_balanced_weights
from xentjax._losses.imbalance import inverse_frequency_weights as inverse_frequency_weights
from xentjax._losses.imbalance import ldam_loss as ldam_loss
from xentjax._losses.imbalance import logit_adjusted_cross_entropy as logit_adjusted_cross_entropy
from xentjax._losses.imbalance import seesaw_loss as seesaw_loss
from xentjax._losses.likelihood import gaussian_nll as gaussian_nll
from xentjax._losses.likelihood import laplace_nll as laplace_nll
from xentjax._losses.likelihood import mixture_of_logistics_nll as mixture_of_logistics_nll
from xentjax._losses.likelihood import poisson_nll as poisson_nll
from xentjax._losses.margin import margin_cross_entropy as margin_cross_entropy
from xentjax._losses.noise import backward_corrected_cross_entropy as backward_corrected_cross_entropy
from xentjax._losses.noise import forward_corrected_cross_entropy as forward_corrected_cross_entropy
from xentjax._losses.ordinal import coral_loss as coral_loss
from xentjax._losses.ordinal import cumulative_link_loss as cumulative_link_loss
from xentjax._losses.overlap import boundary_loss as boundary_loss
from xentjax._losses.overlap import dice_loss as dice_loss
from xentjax._losses.overlap import jaccard_loss as jaccard_loss
from xentjax._losses.overlap import lovasz_hinge_loss as lovasz_hinge_loss
from xentjax._losses.overlap import lovasz_softmax_loss as lovasz_softmax_loss
from xentjax._losses.overlap import present_classes as present_classes
from xentjax._losses.overlap import tversky_loss as tversky_loss
from xentjax._losses.robust import bootstrapped_cross_entropy as bootstrapped_cross_entropy
from xentjax._losses.robust import confidence_penalized_cross_entropy as confidence_penalized_cross_entropy
from xentjax._losses.robust import generalized_cross_entropy as generalized_cross_entropy
from xentjax._losses.robust import normalized_cross_entropy as normalized_cross_entropy
from xentjax._losses.robust import poly_cross_entropy as poly_cross_entropy
from xentjax._losses.robust import symmetric_cross_entropy as symmetric_cross_entropy
from xentjax._losses.robust import taylor_cross_entropy as taylor_cross_entropy
from xentjax._losses.sigmoid import asymmetric_loss as asymmetric_loss
from xentjax._losses.sigmoid import sigmoid_cross_entropy as sigmoid_cross_entropy
from xentjax._losses.sigmoid import sigmoid_focal_loss as sigmoid_focal_loss
from xentjax._losses.softmax import RowStatistics as RowStatistics
from xentjax._losses.softmax import row_statistics as row_statistics
from xentjax._losses.softmax import softmax_cross_entropy as softmax_cross_entropy
from xentjax._losses.softmax import softmax_cross_entropy_with_top_k_labels as softmax_cross_entropy_with_top_k_labels
from xentjax._losses.softmax import softmax_focal_loss as softmax_focal_loss
from xentjax._losses.softmax import softmax_log_prob as softmax_log_prob
from xentjax._losses.sparse import entmax_loss as entmax_loss
from xentjax._losses.sparse import sparsemax_loss as sparsemax_loss
from xentjax._losses.tempered import bi_tempered_cross_entropy as bi_tempered_cross_entropy
from xentjax._losses.top_k_teacher import top_k_distillation_loss as top_k_distillation_loss
from xentjax._many_classes.hierarchical import AdaptiveSoftmax as AdaptiveSoftmax
from xentjax._many_classes.hierarchical import BinaryTree as BinaryTree
from xentjax._many_classes.hierarchical import adaptive_softmax_cross_entropy as adaptive_softmax_cross_entropy
from xentjax._many_classes.hierarchical import adaptive_softmax_log_prob as adaptive_softmax_log_prob
from xentjax._many_classes.hierarchical import hierarchical_softmax_cross_entropy as hierarchical_softmax_cross_entropy
from xentjax._many_classes.hierarchical import huffman_tree as huffman_tree
from xentjax._many_classes.hierarchical import init_adaptive_softmax as init_adaptive_softmax
from xentjax._many_classes.sampled import in_batch_softmax_cross_entropy as in_batch_softmax_cross_entropy
from xentjax._many_classes.sampled import negative_sampling_loss as negative_sampling_loss
from xentjax._many_classes.sampled import noise_contrastive_estimation_loss as noise_contrastive_estimation_loss
from xentjax._many_classes.sampled import sampled_softmax_cross_entropy as sampled_softmax_cross_entropy
from xentjax._reduction import WeightedSum as WeightedSum
from xentjax._reduction import weighted_mean as weighted_mean
from xentjax._reduction import weighted_sum as weighted_sum
from xentjax._routing import ExpertLoad as ExpertLoad
from xentjax._routing import expert_load as expert_load
from xentjax._routing import load_balancing_loss as load_balancing_loss
from xentjax._routing import router_z_loss as router_z_loss
from xentjax._sequence.crf import crf_loss as crf_loss
from xentjax._sequence.ctc import ctc_loss as ctc_loss
from xentjax._sequence.ctc import ctc_loss_from_log_probs as ctc_loss_from_log_probs
from xentjax._sequence.tdt import tdt_loss as tdt_loss
from xentjax._sequence.tdt import tdt_loss_from_log_probs as tdt_loss_from_log_probs
from xentjax._sequence.transducer import transducer_loss as transducer_loss
from xentjax._sequence.transducer import transducer_loss_from_log_probs as transducer_loss_from_log_probs
